// Imagination backward, see rssm_imagine.h.
#include "shared.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// Rows whose gradients of LayerNorm's scale and offset are summed up together, whatever the number of threads.
constexpr int64_t kGroup = 8;

// What all threads share: packed transposed weights, and memory for the gradients of one step of all rows.
template <class T>
struct Backward {
  using Real = Wide<T>;

  const ImagineProblem& p;
  Packed<T> to_stoch, to_action, to_x, to_deter, out, dist, head;  // to_x and to_deter: the GRU's
  Packed<T>* layers;                                               // of the actor, without the first
  Widened<T> scale, offset;
  Operands<T> dx, dparts, dy, dstats, dhead;
  Operands<T>* dunits;                         // of each layer of the actor
  Real *carry, *dz, *daction;                  // [N, D], [N, L], [N, A]
  Real *wide_parts, *dnormed, *of_norm;        // a thread: [3D] twice; a group of rows: [2, 3D]

  Backward(const ImagineProblem& p, Arena& arena)
      : p(p),
        to_stoch(arena, p.hidden, p.latents()),
        to_action(arena, p.hidden, p.actions),
        to_x(arena, 3 * p.deter, p.hidden),
        to_deter(arena, 3 * p.deter, p.deter),
        out(arena, p.hidden, p.deter),
        dist(arena, p.statistics(), p.hidden),
        head(arena, p.layers ? p.heads() : 0, p.layers ? p.layer[p.layers - 1].units : 0),
        layers(arena.take<Packed<T>>(p.layers)),
        scale(arena, 3 * p.deter),
        offset(arena, 3 * p.deter),
        dx(arena, p.rows, p.hidden),
        dparts(arena, p.rows, 3 * p.deter),
        dy(arena, p.rows, p.hidden),
        dstats(arena, p.rows, p.statistics()),
        dhead(arena, p.rows, p.layers ? p.heads() : 0),
        dunits(arena.take<Operands<T>>(p.layers)),
        carry(arena.take<Real>(p.rows * p.deter)),
        dz(arena.take<Real>(p.rows * p.latents())),
        daction(arena.take<Real>(p.rows * p.actions)),
        wide_parts(arena.take<Real>(p.threads * 3 * p.deter)),
        dnormed(arena.take<Real>(p.threads * 3 * p.deter)),
        of_norm(arena.take<Real>(p.dnorm_weight ? groups() * 6 * p.deter : 0)) {
    for (int64_t l = 0; l < p.layers; ++l) {
      const Packed<T> layer(arena, l ? p.layer[l].units : 0, l ? p.layer[l - 1].units : 0);
      const Operands<T> room(arena, p.rows, p.layer[l].units);
      if (arena.memory == nullptr) continue;
      layers[l] = layer;
      dunits[l] = room;
    }
  }

  int64_t groups() const { return panels(p.rows, kGroup); }
  bool of_actor() const { return p.dhead != nullptr; }
  bool of_action() const { return of_actor() || p.daction != nullptr; }

  // Whole groups.
  Range rows_of(const Team& team) const {
    const Range mine = share(groups(), team);
    return {mine.begin * kGroup, mine.end * kGroup < p.rows ? mine.end * kGroup : p.rows};
  }

  void prepare(const Team& team) const {
    const T* img_in = static_cast<const T*>(p.img_in_weight);
    const T* gru = static_cast<const T*>(p.gru_weight);
    to_stoch.fill(team, img_in, p.inputs, 1);
    if (of_action()) to_action.fill(team, img_in + p.latents(), p.inputs, 1);
    to_x.fill(team, gru, p.hidden + p.deter, 1);
    to_deter.fill(team, gru + p.hidden, p.hidden + p.deter, 1);
    out.fill(team, p.img_out_weight, p.deter, 1);
    dist.fill(team, p.dist_weight, p.hidden, 1);
    if (team.rank == 0) {
      scale.fill(p.norm_weight);
      offset.fill(p.norm_bias);
    }
    for (const Operands<T>* x : {&dx, &dparts, &dy, &dstats, &dhead}) x->clear(team);
    if (!of_actor()) return;
    head.fill(team, p.head.weight, p.layer[p.layers - 1].units, 1);
    for (int64_t l = 0; l < p.layers; ++l) {
      dunits[l].clear(team);
      if (l) layers[l].fill(team, p.layer[l].weight, p.layer[l - 1].units, 1);
    }
  }

  // The gradients of LayerNorm's scale and offset from those of the groups, in their order.
  void sum_of_groups(const Team& team) const {
    const int64_t width = 3 * p.deter;
    const Range mine = share(2 * width, team);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      Real total = 0;
      for (int64_t g = 0; g < groups(); ++g) total += of_norm[g * 2 * width + j];
      (j < width ? static_cast<Real*>(p.dnorm_weight) + j : static_cast<Real*>(p.dnorm_bias) + j - width)[0] = total;
    }
  }
};

// One thread with its rows; row i of them is row first + i of the problem.
template <class T>
struct BackwardRows {
  using Real = Wide<T>;
  static constexpr int64_t kLanes = kWidth<Real>;

  const Backward<T>& f;
  const ImagineProblem& p;
  const Range rows;
  const int64_t first, count;
  const Operands<T> dx, dparts, dy, dstats, dhead;
  Real *const carry, *const dz, *const daction, *const wide_parts, *const dnormed;

  BackwardRows(const Backward<T>& f, const Team& team)
      : f(f),
        p(f.p),
        rows(f.rows_of(team)),
        first(rows.begin),
        count(rows.end - rows.begin),
        dx(view(f.dx, rows)),
        dparts(view(f.dparts, rows)),
        dy(view(f.dy, rows)),
        dstats(view(f.dstats, rows)),
        dhead(view(f.dhead, rows)),
        carry(f.carry + first * p.deter),
        dz(f.dz + first * p.latents()),
        daction(f.daction + first * p.actions),
        wide_parts(f.wide_parts + team.rank * 3 * p.deter),
        dnormed(f.dnormed + team.rank * 3 * p.deter) {}

  void run() const {
    __builtin_memset(carry, 0, count * p.deter * sizeof(Real));
    if (p.dnorm_weight) {
      const int64_t group = 6 * p.deter;
      __builtin_memset(f.of_norm + first / kGroup * group, 0, panels(count, kGroup) * group * sizeof(Real));
    }
    for (int64_t t = p.steps - 1; t >= 0; --t) {
      step(t);
      if (f.of_action()) action_step(t);
    }
    __builtin_memcpy(row<Real>(p.dstart_deter, first, p.deter), carry, count * p.deter * sizeof(Real));
    if (p.dstart_stoch == nullptr) return;
    f.to_stoch.multiply(kAlone, dx, false, [&](int64_t i, int64_t column, int64_t n, const Real* sums) {
      copy(sums, n, row<Real>(p.dstart_stoch, first + i, p.latents()) + column);
    });
  }

  int64_t at(int64_t t, int64_t i) const { return p.at(t, first + i); }

  // Up to `left` numbers of an output's gradient, zeros where there is none.
  static Vector<Real> grad_or_zeros(const void* grads, int64_t at, int64_t width, int64_t column, int64_t left) {
    return grads ? load_some(row<Real>(grads, at, width) + column, left) : Vector<Real>{};
  }

  static void copy(const Real* sums, int64_t n, Real* to) {
    for (int64_t j = 0; j < n; j += kLanes) store_some(to + j, load(sums + j), n - j);
  }

  // A vector of a gradient becomes the next product's operand, and is kept where it is wanted.
  void put(Vector<Real> x, const Operands<T>& to, void* trace, int64_t width, int64_t t, int64_t i, int64_t column,
           int64_t left) const {
    store_operand_some<T>(to[i] + column, x, left);
    if (trace != nullptr) store_some(row<T>(trace, at(t, i), width) + column, x, left);
  }

  // sums·elu'(of the layer's output).
  void put_elu(const void* output, const Operands<T>& to, void* trace, int64_t width, int64_t t, int64_t i,
               int64_t column, int64_t n, const Real* sums) const {
    const T* y = row<T>(output, at(t, i), width) + column;
    for (int64_t j = 0; j < n; j += kLanes) {
      put(load(sums + j) * elu_grad(load_some(y + j, n - j)), to, trace, width, t, i, column + j, n - j);
    }
  }

  void step(int64_t t) const {
    const bool next = t + 1 < p.steps, through = !p.discrete || p.noise.there();
    if (through && next) f.to_stoch.multiply(kAlone, dx, false, [&](auto... place) { write_dz(t, place...); });
    for (int64_t i = 0; i < count; ++i) write_dstats(t, i, through, next);
    f.dist.multiply(kAlone, dstats, false, [&](auto... place) { put_elu(p.y_trace, dy, p.dy, p.hidden, t, place...); });
    f.out.multiply(kAlone, dy, false, [&](auto... place) { write_dh(t, place...); });
    for (int64_t i = 0; i < count; ++i) gates_backward(t, i);
    f.to_x.multiply(kAlone, dparts, false, [&](auto... place) { put_elu(p.x_trace, dx, p.dx, p.hidden, t, place...); });
    f.to_deter.multiply(kAlone, dparts, false, [&](int64_t i, int64_t column, int64_t n, const Real* sums) {
      Real* to = carry + i * p.deter + column;
      for (int64_t j = 0; j < n; j += kLanes) store_some(to + j, load_some(to + j, n - j) + load(sums + j), n - j);
    });
  }

  void write_dz(int64_t t, int64_t i, int64_t column, int64_t n, const Real* sums) const {
    Real* to = dz + i * p.latents() + column;
    for (int64_t j = 0; j < n; j += kLanes) {
      store_some(to + j, grad_or_zeros(p.grad_stoch, at(t, i), p.latents(), column + j, n - j) + load(sums + j), n - j);
    }
  }

  void write_dstats(int64_t t, int64_t i, bool through, bool next) const {
    const int64_t width = p.statistics(), latents = p.latents();
    const Real* own = p.grad_stats ? row<Real>(p.grad_stats, at(t, i), width) : nullptr;
    const Real* of_stoch = p.grad_stoch ? row<Real>(p.grad_stoch, at(t, i), latents) : nullptr;
    if (next) of_stoch = dz + i * latents;
    const auto write = [&](int64_t j, Vector<Real> x, int64_t left) { put(x, dstats, p.dstats, width, t, i, j, left); };
    if (through && of_stoch) {
      const Real* stats = row<Real>(p.stats_trace, at(t, i), width);
      latents_backward(latent_shape(p), stats, of_stoch, noise_at<Real>(p.noise, at(t, i), latents), own, write);
      return;
    }
    for (int64_t j = 0; j < width; j += kLanes) {
      write(j, grad_or_zeros(p.grad_stats, at(t, i), width, j, width - j), width - j);
    }
  }

  // All of the gradient of h_t, in place of the carry.
  void write_dh(int64_t t, int64_t i, int64_t column, int64_t n, const Real* sums) const {
    Real* to = carry + i * p.deter + column;
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vector<Real> own = grad_or_zeros(p.grad_deter, at(t, i), p.deter, column + j, n - j);
      store_some(to + j, load_some(to + j, n - j) + own + load(sums + j), n - j);
    }
  }

  // From dh to dparts; the carry becomes what passes h by.
  void gates_backward(int64_t t, int64_t i) const {
    const int64_t D = p.deter;
    const Real* parts = widened(row<T>(p.parts_trace, at(t, i), 3 * D), 3 * D, wide_parts);
    const Real* kept = row<Real>(p.norm_trace, at(t, i), 2);
    const Norm<Real> norm{kept[0], kept[1]};
    const Real* before =
        t ? row<Real>(p.deter_trace, at(t - 1, i), D) : row<Real>(p.start_deter, first + i, D);
    Real* of_norm = p.dnorm_weight ? f.of_norm + (first + i) / kGroup * 6 * D : nullptr;
    Vector<Real> sums[2] = {};
    for (int64_t j = 0; j < D; j += kLanes) {
      const int64_t left = D - j;
      const Gates<Real> g = gates(parts, norm, f.scale, f.offset, D, j);
      const Vector<Real> dh = load_some(carry + i * D + j, left), was = load_some(before + j, left);
      const Vector<Real> dc = dh * g.update * (1 - g.proposal * g.proposal);
      const Vector<Real> dnorm[3] = {dc * g.candidate * g.reset * (1 - g.reset), dc * g.reset,
                                     dh * (g.proposal - was) * g.update * (1 - g.update)};
      for (int k = 0; k < 3; ++k) {
        const int64_t column = k * D + j;
        const Vector<Real> dnormed_k = dnorm[k] * f.scale.at(column);
        store_some(dnormed + column, dnormed_k, left);
        sums[0] += dnormed_k;
        sums[1] += dnormed_k * g.normed[k];
        if (of_norm == nullptr) continue;
        add(of_norm + column, dnorm[k] * g.normed[k], left);
        add(of_norm + 3 * D + column, dnorm[k], left);
      }
      store_some(carry + i * D + j, (1 - g.update) * dh, left);
    }
    const Real mean = sum(sums[0]) / (3 * D), slope = sum(sums[1]) / (3 * D);
    for (int64_t j = 0; j < 3 * D; j += kLanes) {
      const int64_t left = 3 * D - j;
      const Vector<Real> normed = (load_some(parts + j, left) - norm.mean) * norm.rstd;
      const Vector<Real> x = norm.rstd * (load_some(dnormed + j, left) - mean - normed * slope);
      put(x, dparts, p.dparts, 3 * D, t, i, j, left);
    }
  }

  static void add(Real* to, Vector<Real> x, int64_t left) { store_some(to, load_some(to, left) + x, left); }

  // The gradient of step t's action, and through the actor.
  void action_step(int64_t t) const {
    f.to_action.multiply(kAlone, dx, false, [&](int64_t i, int64_t column, int64_t n, const Real* sums) {
      Real* to = (p.daction ? row<Real>(p.daction, at(t, i), p.actions) : daction + i * p.actions) + column;
      for (int64_t j = 0; j < n; j += kLanes) {
        const Vector<Real> own = grad_or_zeros(p.grad_action, at(t, i), p.actions, column + j, n - j);
        store_some(to + j, own + load(sums + j), n - j);
      }
    });
    if (!f.of_actor()) return;
    for (int64_t i = 0; i < count; ++i) {
      const Real* head = row<Real>(p.head_trace, at(t, i), p.heads());
      T* to = row<T>(p.dhead, at(t, i), p.heads());
      const LatentNoise<Real> noise = noise_at<Real>(p.action_noise, at(t, i), p.actions);
      sample_action_backward(action_kind(p), daction + i * p.actions, head, noise, [&](int64_t j, Real x) {
        to[j] = narrow<T>(x);
        dhead[i][j] = operand<T>(x);
      });
    }
    for (int64_t l = p.layers - 1; l >= 0; --l) {
      const bool last = l == p.layers - 1;
      const Packed<T>& after = last ? f.head : f.layers[l + 1];
      after.multiply(kAlone, last ? dhead : view(f.dunits[l + 1], rows), false, [&](auto... place) {
        put_elu(p.layer_trace[l], view(f.dunits[l], rows), p.dlayer[l], p.layer[l].units, t, place...);
      });
    }
  }
};

template <class T>
int64_t bytes(const ImagineProblem& problem) {
  Arena count{nullptr};
  Backward<T>(problem, count);
  return count.used;
}

template <class T>
void run(const ImagineProblem& problem, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  const Backward<T> backward(problem, arena);
  run_team(problem.threads, [&](const Team& team) {
    backward.prepare(team);
    team.barrier();
    BackwardRows<T>(backward, team).run();
    if (problem.dnorm_weight == nullptr) return;
    team.barrier();
    backward.sum_of_groups(team);
  });
}

}  // namespace

const ByDtype<Pass<ImagineProblem>> imagine_backward = {
    {bytes<float>, run<float>}, {bytes<double>, run<double>}, {bytes<Bf16>, run<Bf16>}};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
