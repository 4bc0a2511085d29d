// Imagination forward, see rssm_imagine.h.
#include "shared.h"
#include "sparse.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// What all threads share: packed weights, and memory for the operands of all rows.
template <class T>
struct Forward {
  using Real = Wide<T>;

  const ImagineProblem& p;
  Layer<T> from_action, gru, out, dist;  // from_action: img_in's columns of the action, and its bias
  Packed<T> from_stoch;                  // img_in's columns of stoch
  Widened<T> scale, offset;
  Packed<T> actor_stoch;       // the actor's first layer: its columns of stoch
  Layer<T>* layers;            // the first one: its columns of deter
  Layer<T>* head;
  SparseRows<Real> stoch;
  Operands<T> input, action, hidden;  // [x, h]; a; y
  Operands<T>* units;                 // of each layer of the actor
  T* parts;                           // [N, 3D] where they are not kept
  Real *wide_parts, *heads;           // a thread: [3D]; [N, heads] where they are not kept
  int32_t* chosen;                    // a thread: [S]

  Forward(const ImagineProblem& p, Arena& arena)
      : p(p),
        from_action(arena, p.actions, p.hidden),
        gru(arena, p.hidden + p.deter, 3 * p.deter),
        out(arena, p.deter, p.hidden),
        dist(arena, p.hidden, p.statistics()),
        from_stoch(arena, p.latents(), p.hidden),
        scale(arena, 3 * p.deter),
        offset(arena, 3 * p.deter),
        actor_stoch(arena, p.latents(), p.layers ? p.layer[0].units : 0),
        layers(arena.take<Layer<T>>(p.layers)),
        head(arena.take<Layer<T>>(1)),
        stoch(arena, p.rows, p.latents(), p.threads),
        input(arena, p.rows, p.hidden + p.deter),
        action(arena, p.rows, p.actions),
        hidden(arena, p.rows, p.hidden),
        units(arena.take<Operands<T>>(p.layers)),
        parts(arena.take<T>(p.parts_trace ? 0 : p.rows * 3 * p.deter)),
        wide_parts(arena.take<Real>(p.threads * 3 * p.deter)),
        heads(arena.take<Real>(p.layers && !p.head_trace ? p.rows * p.heads() : 0)),
        chosen(arena.take<int32_t>(p.threads * p.stoch)) {
    int64_t inputs = p.deter;
    for (int64_t l = 0; l < p.layers; ++l) {
      const Layer<T> layer(arena, inputs, p.layer[l].units);
      const Operands<T> room(arena, p.rows, inputs = p.layer[l].units);
      if (arena.memory == nullptr) continue;
      layers[l] = layer;
      units[l] = room;
    }
    const Layer<T> layer(arena, inputs, p.layers ? p.heads() : 0);
    if (arena.memory != nullptr) *head = layer;
  }

  void prepare(const Team& team) const {
    const int64_t L = p.latents();
    from_stoch.fill(team, p.img_in_weight, 1, p.inputs);
    from_action.fill(team, p.img_in_weight, p.img_in_bias, p.inputs, L);
    gru.fill(team, p.gru_weight, p.gru_bias, p.hidden + p.deter);
    out.fill(team, p.img_out_weight, p.img_out_bias, p.deter);
    dist.fill(team, p.dist_weight, p.dist_bias, p.hidden);
    if (team.rank == 0) {
      scale.fill(p.norm_weight);
      offset.fill(p.norm_bias);
    }
    for (int64_t l = 0; l < p.layers; ++l) {
      const LayerWeights& layer = p.layer[l];
      if (l == 0) actor_stoch.fill(team, layer.weight, 1, L + p.deter);
      layers[l].fill(team, layer.weight, layer.bias, l ? p.layer[l - 1].units : L + p.deter, l ? 0 : L);
      units[l].clear(team);
    }
    if (p.layers) head->fill(team, p.head.weight, p.head.bias, p.layer[p.layers - 1].units);
    for (const Operands<T>* x : {&input, &action, &hidden}) x->clear(team);
  }
};

// One thread with its rows; row i of them is row first + i of the problem.
template <class T>
struct ForwardRows {
  using Real = Wide<T>;
  static constexpr int64_t kLanes = kWidth<Real>;

  const Forward<T>& f;
  const ImagineProblem& p;
  const Range rows;
  const int64_t first, count;
  const SparseRows<Real> stoch;
  const Operands<T> input, deter, action, hidden;
  Real* const wide_parts;
  int32_t* const chosen;

  ForwardRows(const Forward<T>& f, const Team& team)
      : f(f),
        p(f.p),
        rows(share(p.rows, team)),
        first(rows.begin),
        count(rows.end - rows.begin),
        stoch(f.stoch.part(team, rows, p.latents())),
        input(view(f.input, rows)),
        deter(view(f.input, rows, p.hidden)),
        action(view(f.action, rows)),
        hidden(view(f.hidden, rows)),
        wide_parts(f.wide_parts + team.rank * 3 * p.deter),
        chosen(f.chosen + team.rank * p.stoch) {}

  void run() const {
    for (int64_t i = 0; i < count; ++i) {
      to_operands<T>(row<Real>(p.start_deter, first + i, p.deter), p.deter, deter[i]);
      stoch.template set<T>(i, row<Real>(p.start_stoch, first + i, p.latents()), p.latents());
    }
    for (int64_t t = 0; t < p.steps; ++t) {
      if (p.layers) {
        act(t);
      } else {
        take_action(t);
      }
      step(t);
    }
  }

  int64_t at(int64_t t, int64_t i) const { return p.at(t, first + i); }

  void step(int64_t t) const {
    f.from_action.weight.multiply(kAlone, action, false, [&](auto... place) { write_x(t, place...); });
    f.gru.weight.multiply(kAlone, input, false, [&](auto... place) { write_parts(t, place...); });
    for (int64_t i = 0; i < count; ++i) update(t, i);
    f.out.weight.multiply(kAlone, deter, false, [&](auto... place) {
      write_elu(f.out.bias, hidden, p.y_trace, p.hidden, t, place...);
    });
    f.dist.weight.multiply(kAlone, hidden, false, [&](auto... place) { write_stats(t, place...); });
    for (int64_t i = 0; i < count; ++i) sample(t, i);
  }

  void write_x(int64_t t, int64_t i, int64_t column, int64_t n, const Real* sums) const {
    int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
      sparse_elu<4>(f.from_stoch, f.from_action.bias, input, p.x_trace, t, i, column + j, n - j, sums + j);
    }
    for (; j < n; j += kLanes) {
      sparse_elu<1>(f.from_stoch, f.from_action.bias, input, p.x_trace, t, i, column + j, n - j, sums + j);
    }
  }

  // elu(sums + bias + W z), z the latents before the step, for `Vectors` vectors, the last one perhaps not whole.
  template <int Vectors>
  void sparse_elu(const Packed<T>& of_stoch, const Widened<T>& bias, const Operands<T>& to, void* trace, int64_t t,
                  int64_t i, int64_t column, int64_t left, const Real* sums) const {
    Vector<Real> x[Vectors];
    for (int v = 0; v < Vectors; ++v) x[v] = load(sums + v * kLanes) + bias.at(column + v * kLanes);
    add_rows<Vectors>(of_stoch, stoch, i, column, x);
    for (int v = 0; v < Vectors; ++v) {
      put(elu(x[v]), to, trace, of_stoch.columns, t, i, column + v * kLanes, left - v * kLanes);
    }
  }

  void write_elu(const Widened<T>& bias, const Operands<T>& to, void* trace, int64_t width, int64_t t, int64_t i,
                 int64_t column, int64_t n, const Real* sums) const {
    for (int64_t j = 0; j < n; j += kLanes) {
      put(elu(load(sums + j) + bias.at(column + j)), to, trace, width, t, i, column + j, n - j);
    }
  }

  // A vector of a layer's output becomes the next product's operand, and is kept where there is a trace.
  void put(Vector<Real> x, const Operands<T>& to, void* trace, int64_t width, int64_t t, int64_t i, int64_t column,
           int64_t left) const {
    store_operand_some<T>(to[i] + column, x, left);
    if (trace != nullptr) store_some(row<T>(trace, at(t, i), width) + column, x, left);
  }

  T* parts_of(int64_t t, int64_t i) const {
    const int64_t width = 3 * p.deter;
    return p.parts_trace ? row<T>(p.parts_trace, at(t, i), width) : f.parts + (first + i) * width;
  }

  void write_parts(int64_t t, int64_t i, int64_t column, int64_t n, const Real* sums) const {
    T* to = parts_of(t, i) + column;
    for (int64_t j = 0; j < n; j += kLanes) store_some(to + j, load(sums + j) + f.gru.bias.at(column + j), n - j);
  }

  void update(int64_t t, int64_t i) const {
    const Real* parts = widened(parts_of(t, i), 3 * p.deter, wide_parts);
    const Norm<Real> norm = layer_norm(parts, 3 * p.deter);
    if (p.norm_trace) {
      Real* kept = row<Real>(p.norm_trace, at(t, i), 2);
      kept[0] = norm.mean;
      kept[1] = norm.rstd;
    }
    const Real* before = t ? row<Real>(p.deter_trace, at(t - 1, i), p.deter)
                           : row<Real>(p.start_deter, first + i, p.deter);
    Real* to = row<Real>(p.deter_trace, at(t, i), p.deter);
    for (int64_t j = 0; j < p.deter; j += kLanes) {
      const int64_t left = p.deter - j;
      const Gates<Real> g = gates(parts, norm, f.scale, f.offset, p.deter, j);
      const Vector<Real> h = g.update * g.proposal + (1 - g.update) * load_some(before + j, left);
      store_some(to + j, h, left);
      store_operand_some<T>(deter[i] + j, h, left);
    }
  }

  void write_stats(int64_t t, int64_t i, int64_t column, int64_t n, const Real* sums) const {
    Real* to = row<Real>(p.stats_trace, at(t, i), p.statistics()) + column;
    for (int64_t j = 0; j < n; j += kLanes) store_some(to + j, load(sums + j) + f.dist.bias.at(column + j), n - j);
  }

  void sample(int64_t t, int64_t i) const {
    const int64_t width = p.latents();
    Real* out = row<Real>(p.stoch_trace, at(t, i), width);
    const Real* stats = row<Real>(p.stats_trace, at(t, i), p.statistics());
    const LatentNoise<Real> noise = noise_at<Real>(p.noise, at(t, i), width);
    sample_latents(latent_shape(p), stats, noise, out, p.discrete ? chosen : nullptr);
    if (p.discrete) {
      stoch.set_ones(i, chosen, p.stoch, p.discrete);
    } else {
      stoch.template set<T>(i, out, width);
    }
  }

  void take_action(int64_t t) const {
    if (p.actions == 0) return;
    for (int64_t i = 0; i < count; ++i) {
      to_operands<T>(row<T>(p.input_action, at(t, i), p.actions), p.actions, action[i]);
    }
  }

  // The actor's action for the state before step t.
  void act(int64_t t) const {
    f.layers[0].weight.multiply(kAlone, deter, false, [&](auto... place) { write_first(t, place...); });
    for (int64_t l = 1; l < p.layers; ++l) {
      f.layers[l].weight.multiply(kAlone, view(f.units[l - 1], rows), false, [&](auto... place) {
        write_elu(f.layers[l].bias, view(f.units[l], rows), p.layer_trace[l], p.layer[l].units, t, place...);
      });
    }
    f.head->weight.multiply(kAlone, view(f.units[p.layers - 1], rows), false,
                            [&](auto... place) { write_head(t, place...); });
    for (int64_t i = 0; i < count; ++i) {
      Real* out = row<Real>(p.action_trace, at(t, i), p.actions);
      sample_action(action_kind(p), head_of(t, i), noise_at<Real>(p.action_noise, at(t, i), p.actions), out);
      to_operands<T>(out, p.actions, action[i]);
    }
  }

  void write_first(int64_t t, int64_t i, int64_t column, int64_t n, const Real* sums) const {
    const Operands<T> to = view(f.units[0], rows);
    int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
      sparse_elu<4>(f.actor_stoch, f.layers[0].bias, to, p.layer_trace[0], t, i, column + j, n - j, sums + j);
    }
    for (; j < n; j += kLanes) {
      sparse_elu<1>(f.actor_stoch, f.layers[0].bias, to, p.layer_trace[0], t, i, column + j, n - j, sums + j);
    }
  }

  Real* head_of(int64_t t, int64_t i) const {
    return p.head_trace ? row<Real>(p.head_trace, at(t, i), p.heads()) : f.heads + (first + i) * p.heads();
  }

  void write_head(int64_t t, int64_t i, int64_t column, int64_t n, const Real* sums) const {
    Real* to = head_of(t, i) + column;
    for (int64_t j = 0; j < n; j += kLanes) store_some(to + j, load(sums + j) + f.head->bias.at(column + j), n - j);
  }
};

template <class T>
int64_t bytes(const ImagineProblem& problem) {
  Arena count{nullptr};
  Forward<T>(problem, count);
  return count.used;
}

template <class T>
void run(const ImagineProblem& problem, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  const Forward<T> forward(problem, arena);
  run_team(problem.threads, [&](const Team& team) {
    forward.prepare(team);
    team.barrier();
    ForwardRows<T>(forward, team).run();
  });
}

}  // namespace

const ByDtype<Pass<ImagineProblem>> imagine_forward = {
    {bytes<float>, run<float>}, {bytes<double>, run<double>}, {bytes<Bf16>, run<Bf16>}};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
