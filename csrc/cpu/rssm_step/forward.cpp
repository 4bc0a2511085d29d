// The step of filtering for acting, see rssm_step.h. Two models walk side by side until the second looks at the first.
#include "../parts/actor_sample.h"
#include "../parts/gru.h"
#include "../parts/operands.h"
#include "few_rows.h"
#include "rssm_step.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// Numbers [B, width] of which few are not zero: those, and where they are.
template <class T>
struct Sparse {
  using Real = Wide<T>;

  int64_t width;
  Real* values;
  int32_t *places, *counts;

  Sparse(Arena& arena, int64_t rows, int64_t width)
      : width(width),
        values(arena.take<Real>(rows * (width + 1))),
        places(arena.take<int32_t>(rows * (width + 1))),
        counts(arena.take<int32_t>(rows)) {}

  // From row i, or from zeros if that is null.
  void fill(int64_t i, const Real* from) const {
    Real* to = values + i * (width + 1);
    int32_t* at = places + i * (width + 1);
    int32_t count = 0;
    for (int64_t l = 0; l < width && from != nullptr; ++l) {
      to[count] = from[l];
      at[count] = int32_t(l);
      count += from[l] != 0;
    }
    for (int32_t c = 0; c < count; ++c) to[c] = widen(narrow<T>(to[c]));
    counts[i] = count;
  }

  // x plus row i times the columns from `column` on, up to `left`, of rows [width, units].
  Vector<Real> add(int64_t i, const T* rows, int64_t units, int64_t column, int64_t left, Vector<Real> x) const {
    const Real* value = values + i * (width + 1);
    const int32_t* at = places + i * (width + 1);
    for (int32_t c = 0; c < counts[i]; ++c) x += value[c] * load_some(rows + at[c] * units + column, left);
    return x;
  }
};

// A layer out = W in + b, and memory for it. Some of its columns may be given turned, [latents, units], from column
// `begin` on: those numbers of the input are in `sparse`, and `in` holds zeros there.
template <class T>
struct FewRows {
  using Real = Wide<T>;

  LayerWeights layer;
  Operands<T> in;
  int64_t depth, begin;
  const T* turned;  // or null
  Sparse<T> sparse;
  Real *sums, *more;  // [B, units], of the columns before `begin` and behind the turned ones

  FewRows(Arena& arena, const LayerWeights& layer, int64_t rows, int64_t depth, const void* turned = nullptr,
          int64_t begin = 0, int64_t latents = 0)
      : layer(layer),
        in(arena, layer.weight ? rows : 0, depth),
        depth(depth),
        begin(turned ? begin : depth),
        turned(static_cast<const T*>(turned)),
        sparse(arena, turned ? rows : 0, turned ? latents : 0),
        sums(arena.take<Real>(in.rows * layer.units)),
        more(arena.take<Real>(turned ? in.rows * layer.units : 0)) {}

  // Latents `from` (null: zeros), of row i, at their column.
  void fill_latents(int64_t i, int64_t column, const Real* from, int64_t width) const {
    if (turned != nullptr) return sparse.fill(i, from);
    if (from != nullptr) to_operands<T>(from, width, in[i] + column);
  }

  // Columns [first, last) into `to`.
  void multiply(int64_t first, int64_t last, const Range& units, Real* to) const {
    few_rows<T>(in.data + first, in.stride, in.rows, static_cast<const T*>(layer.weight) + first, depth, last - first,
                units.begin, units.end, to, layer.units);
  }

  // Calls put(row, unit, x, left) with vectors of the units that this thread has.
  template <class Put>
  void run(const Team& team, const Put& put) const {
    const Range mine = share(layer.units, team);
    const T* bias = static_cast<const T*>(layer.bias);
    multiply(0, begin, mine, sums);
    if (turned != nullptr) multiply(begin + sparse.width, depth, mine, more);
    for (int64_t i = 0; i < in.rows; ++i) {
      for (int64_t j = mine.begin; j < mine.end; j += kWidth<Real>) {
        const int64_t left = mine.end - j, at = i * layer.units + j;
        Vector<Real> x = load_some(sums + at, left);
        if (turned != nullptr) x = sparse.add(i, turned, layer.units, j, left, x + load_some(more + at, left));
        put(i, j, x + load_some(bias + j, left), left);
      }
    }
  }

  // elu(out) as what the next layer reads.
  void run_elu(const Team& team, const FewRows& next) const {
    run(team, [&](int64_t i, int64_t j, Vector<Real> x, int64_t left) {
      store_operand_some<T>(next.in[i] + j, elu(x), left);
    });
  }

  // out into rows of memory.
  void run_into(const Team& team, Real* to) const {
    run(team, [&](int64_t i, int64_t j, Vector<Real> x, int64_t left) {
      store_some(to + i * layer.units + j, x, left);
    });
  }
};

template <class T>
struct Head {
  using Real = Wide<T>;

  const StepHead& head;
  FewRows<T> hidden, dist;

  // `turned`, `begin` and `latents` of the hidden layer, see FewRows.
  Head(Arena& arena, const StepHead& head, int64_t rows, int64_t depth, const void* turned = nullptr, int64_t begin = 0,
       int64_t latents = 0)
      : head(head),
        hidden(arena, head.hidden, rows, depth, turned, begin, latents),
        dist(arena, head.dist, rows, head.hidden.units) {}

  void sample(const StepModel& model, int64_t i) const {
    const int64_t width = model.latents(), first = i * width;
    const Real* values = static_cast<const Real*>(head.noise.values);
    const LatentNoise<Real> noise{values ? values + first : nullptr, head.noise.seed, first};
    sample_latents(LatentShape{model.stoch, model.discrete, model.min_std},
                   static_cast<const Real*>(head.stats) + i * model.statistics(), noise,
                   static_cast<Real*>(head.stoch) + first, static_cast<int32_t*>(nullptr));
  }
};

template <class T>
struct Model {
  using Real = Wide<T>;
  static constexpr int64_t kLanes = kWidth<Real>;

  const StepProblem& p;
  const StepModel& m;
  FewRows<T> img_in, gru;
  Head<T> post, prior;
  Real* parts;  // [B, 3D]
  Widened<T> scale, offset;

  // `below`: the model before, if this one sees it.
  Model(Arena& arena, const StepProblem& p, const StepModel& m, const StepModel* below)
      : p(p),
        m(m),
        img_in(arena, m.img_in, p.rows, m.inputs, m.img_in_rows, 0, m.latents()),
        gru(arena, m.gru, p.rows, m.img_in.units + m.deter),
        post(arena, m.post, p.rows, m.deter + m.embed + (below ? below->features() : 0), below ? m.obs_out_rows : nullptr,
             m.deter + m.embed, below ? below->latents() : 0),
        prior(arena, m.prior, p.rows, m.deter),
        parts(arena.take<Real>(p.rows * 3 * m.deter)),
        scale(arena, 3 * m.deter),
        offset(arena, 3 * m.deter) {}

  // Where row i of a state begins; null where it counts as zeros.
  const Real* masked(const void* state, int64_t i, int64_t width) const {
    return p.is_first && p.is_first[i] ? nullptr : static_cast<const Real*>(state) + i * width;
  }

  static void fill(const Real* from, int64_t n, Element<T>* to) {
    if (from) to_operands<T>(from, n, to);
  }

  // What is known before the step becomes operands; all else in them is zero.
  void begin(const Team& team) const {
    for (const FewRows<T>* x : {&img_in, &gru, &post.hidden, &post.dist, &prior.hidden, &prior.dist}) x->in.clear(team);
    if (team.rank == 0) {
      scale.fill(m.norm_weight);
      offset.fill(m.norm_bias);
    }
    const Range rows = share(p.rows, team);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      img_in.fill_latents(i, 0, masked(m.before_stoch, i, m.latents()), m.latents());
      if (m.actions) fill(masked(m.action, i, m.actions), m.actions, img_in.in[i] + m.latents());
      fill(masked(m.before_deter, i, m.deter), m.deter, gru.in[i] + m.img_in.units);
      if (post.head.there()) {
        to_operands<T>(static_cast<const T*>(m.embed_in) + i * m.embed, m.embed, post.hidden.in[i] + m.deter);
      }
    }
  }

  void update(const Team& team) const {
    const Range rows = share(p.rows, team);
    for (int64_t i = rows.begin; i < rows.end; ++i) update_row(i);
  }

  void update_row(int64_t i) const {
    const Real* row = parts + i * 3 * m.deter;
    const Norm<Real> norm = layer_norm(row, 3 * m.deter);
    const Real* before = masked(m.before_deter, i, m.deter);
    Real* to = static_cast<Real*>(m.after_deter) + i * m.deter;
    for (int64_t j = 0; j < m.deter; j += kLanes) {
      const int64_t left = m.deter - j;
      const Gates<Real> g = gates(row, norm, scale, offset, m.deter, j);
      const Vector<Real> was = before ? load_some(before + j, left) : Vector<Real>{};
      const Vector<Real> h = g.update * g.proposal + (1 - g.update) * was;
      store_some(to + j, h, left);
      if (post.head.there()) store_operand_some<T>(post.hidden.in[i] + j, h, left);
      if (prior.head.there()) store_operand_some<T>(prior.hidden.in[i] + j, h, left);
    }
  }

  // Row i's features, stoch and then deter, as what a layer reads from a column on.
  void features(int64_t i, const FewRows<T>& to, int64_t column) const {
    to.fill_latents(i, column, static_cast<const Real*>(m.post.stoch) + i * m.latents(), m.latents());
    to_operands<T>(static_cast<const Real*>(m.after_deter) + i * m.deter, m.deter, to.in[i] + column + m.latents());
  }
};

template <class T>
struct Step {
  using Real = Wide<T>;

  const StepProblem& p;
  Model<T> lower, upper;    // the latter without rows if there is one model only
  FewRows<T>* actor;        // its layers and its head
  Real* heads;              // [B, heads]

  Step(const StepProblem& p, Arena& arena)
      : p(p),
        lower(arena, p, p.model[0], nullptr),
        upper(arena, p, p.model[1], p.model[1].sees_below ? &p.model[0] : nullptr),
        actor(arena.take<FewRows<T>>(p.layers + 1)),
        heads(arena.take<Real>(p.rows * p.heads())) {
    const StepModel& seen = p.model[p.models - 1];
    int64_t depth = seen.features();
    for (int64_t l = 0; l <= p.layers && p.layers; ++l) {
      const LayerWeights& layer = l < p.layers ? p.layer[l] : p.head;
      const FewRows<T> few(arena, layer, p.rows, depth, l == 0 ? p.actor_rows : nullptr, 0, seen.latents());
      depth = layer.units;
      if (arena.memory != nullptr) actor[l] = few;
    }
  }

  bool two() const { return p.models == 2; }

  void run(const Team& team) const {
    each([&](const Model<T>& x) { x.begin(team); });
    for (int64_t l = 0; l <= p.layers && p.layers; ++l) actor[l].in.clear(team);
    team.barrier();
    each([&](const Model<T>& x) { x.img_in.run_elu(team, x.gru); });
    team.barrier();
    each([&](const Model<T>& x) { x.gru.run_into(team, x.parts); });
    team.barrier();
    each([&](const Model<T>& x) { x.update(team); });
    team.barrier();
    if (two()) {
      look(team, lower, &upper.post.hidden, upper.m.deter + upper.m.embed);
      team.barrier();
    }
    look(team, two() ? upper : lower, p.layers ? actor : nullptr, 0);
    if (p.layers) act(team);
  }

  template <class Do>
  void each(const Do& act) const {
    act(lower);
    if (two()) act(upper);
  }

  // The heads of one model, and its features where a layer of the next one, or of the actor (null: none), reads them.
  void look(const Team& team, const Model<T>& x, const FewRows<T>* by, int64_t column) const {
    const Range rows = share(p.rows, team);
    const Head<T>* heads[2] = {&x.post, &x.prior};
    for (const Head<T>* head : heads) {
      if (head->head.there()) head->hidden.run_elu(team, head->dist);
    }
    team.barrier();
    for (const Head<T>* head : heads) {
      if (head->head.there()) head->dist.run_into(team, static_cast<Real*>(head->head.stats));
    }
    team.barrier();
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (const Head<T>* head : heads) {
        if (head->head.there()) head->sample(x.m, i);
      }
      if (by != nullptr) x.features(i, *by, column);
    }
  }

  void act(const Team& team) const {
    for (int64_t l = 0; l < p.layers; ++l) {
      team.barrier();
      actor[l].run_elu(team, actor[l + 1]);
    }
    team.barrier();
    actor[p.layers].run_into(team, heads);
    team.barrier();
    const Range rows = share(p.rows, team);
    const ActionKind kind{p.actions, p.one_hot_actions, p.min_std};
    const Real* values = static_cast<const Real*>(p.action_noise.values);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t first = i * p.actions;
      const LatentNoise<Real> noise{values ? values + first : nullptr, p.action_noise.seed, first};
      sample_action(kind, heads + i * p.heads(), noise, static_cast<Real*>(p.action_out) + first);
    }
  }
};

template <class T>
int64_t bytes(const StepProblem& problem) {
  Arena count{nullptr};
  Step<T>(problem, count);
  return count.used;
}

template <class T>
void run(const StepProblem& problem, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  const Step<T> step(problem, arena);
  run_team(problem.threads, [&](const Team& team) { step.run(team); });
}

}  // namespace

const ByDtype<Pass<StepProblem>> filter_step =
    {{bytes<float>, run<float>}, {bytes<double>, run<double>}, {bytes<Bf16>, run<Bf16>}};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
