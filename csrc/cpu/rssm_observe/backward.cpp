// The recurrence backward, see rssm_observe.h. A step t, the last one first, has six phases, a barrier after each:
//
//     columns  dz = grad_stoch_t + keep_{t+1}·W_stochᵀ dx_{t+1}
//     rows     dstats_t = grad_stats_t + (dz through the sample)
//     columns  dy_t = elu'(y_t)·W_distᵀ dstats_t
//     columns  dh_t = grad_deter_t + W_obsᵀ dy_t + carry
//     rows     dparts_t = LayerNorm'(gates'(dh_t));  carry = (1 - update_t)·dh_t
//     columns  [dx_t, dbefore] = W_gruᵀ dparts_t;  dx_t ·= elu'(x_t);  carry = keep_t·(carry + dbefore)
//
// The gradients of LayerNorm's weights are summed over a group of rows as the rows come, over the groups at the end.
#include "shared.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

constexpr int64_t kMostGroups = 64;

template <class T>
struct Backward {
  using Real = Wide<T>;
  static constexpr int64_t kLanes = kWidth<Real>;

  const ObserveProblem& p;
  int64_t groups;
  Widened<T> scale, offset;
  Packed<T> gru, obs, dist, to_stoch;
  Operands<T> dparts, dstats, dy, dx;
  Real *dz, *dh, *carry, *dnormed;  // [B, L], [B, D], [B, D], [B, 3D]
  Real *scale_sums, *offset_sums;   // [groups, 3D]

  Backward(const ObserveProblem& p, Arena& arena)
      : p(p),
        groups(p.batch < kMostGroups ? p.batch : kMostGroups),
        scale(arena, 3 * p.deter),
        offset(arena, 3 * p.deter),
        gru(arena, 3 * p.deter, p.hidden + p.deter),
        obs(arena, p.hidden, p.deter),
        dist(arena, p.statistics(), p.hidden),
        to_stoch(arena, p.hidden, through_stoch() ? p.latents() : 0),
        dparts(arena, p.batch, 3 * p.deter),
        dstats(arena, p.batch, p.statistics()),
        dy(arena, p.batch, p.hidden),
        dx(arena, p.batch, p.hidden),
        dz(arena.take<Real>(p.batch * p.latents())),
        dh(arena.take<Real>(p.batch * p.deter)),
        carry(arena.take<Real>(p.batch * p.deter)),
        dnormed(arena.take<Real>(p.batch * 3 * p.deter)),
        scale_sums(arena.take<Real>(groups * 3 * p.deter)),
        offset_sums(arena.take<Real>(groups * 3 * p.deter)) {}

  // Modes of one-hots have no gradient; modes of Gaussians are means.
  bool through_stoch() const { return !p.discrete || p.sampled(); }

  void run(const Team& team) const {
    prepare(team);
    team.barrier();
    for (int64_t t = p.length - 1; t >= 0; --t) step(team, t);
    finish(team);
  }

  void prepare(const Team& team) const {
    if (team.rank == 0) {
      scale.fill(p.norm_weight);
      offset.fill(p.norm_bias);
    }
    pack_transposed(team, p.weight_gru, gru);
    pack_transposed(team, p.weight_obs, obs);
    pack_transposed(team, p.weight_dist, dist);
    if (through_stoch()) pack_transposed(team, p.weight_stoch, to_stoch);
    for (const Operands<T>* x : {&dparts, &dstats, &dy, &dx}) x->clear(team);
    clear(team, carry, p.batch * p.deter);
    clear(team, scale_sums, groups * 3 * p.deter);
    clear(team, offset_sums, groups * 3 * p.deter);
  }

  static void clear(const Team& team, Real* numbers, int64_t count) {
    const Range mine = share(count, team);
    __builtin_memset(numbers + mine.begin, 0, (mine.end - mine.begin) * sizeof(Real));
  }

  void step(const Team& team, int64_t t) const {
    const Range rows = share(p.batch, team), mine = share(groups, team);
    const bool reverse = t % 2 == 1, next = t + 1 < p.length;
    if (through_stoch() && next) {
      to_stoch.multiply(team, dx, reverse, [&](auto... at) { write_dz(t, at...); });
      team.barrier();
    }
    for (int64_t b = rows.begin; b < rows.end; ++b) sample_backward(b, t, next);
    team.barrier();
    dist.multiply(team, dstats, reverse, [&](auto... at) { write_dy(t, at...); });
    team.barrier();
    obs.multiply(team, dy, reverse, [&](auto... at) { write_dh(t, at...); });
    team.barrier();
    for (int64_t g = mine.begin; g < mine.end; ++g) {
      for (int64_t b = p.batch * g / groups; b < p.batch * (g + 1) / groups; ++b) update_backward(g, b, t);
    }
    team.barrier();
    gru.multiply(team, dparts, reverse, [&](auto... at) { write_dx_and_carry(t, at...); });
    team.barrier();
  }

  int64_t at(int64_t b, int64_t t) const { return b * p.length + t; }

  // A gradient from outside, or zeros.
  static Vector<Real> grad_or_zeros(const void* grads, int64_t at, int64_t width, int64_t j, int64_t left) {
    return grads ? load_some(row<Real>(grads, at, width) + j, left) : Vector<Real>{};
  }

  void write_dz(int64_t t, int64_t b, int64_t column, int64_t count, const Real* sums) const {
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vector<Real> grad = grad_or_zeros(p.grad_stoch, at(b, t), p.latents(), column + j, count - j);
      store_some(dz + b * p.latents() + column + j, grad + load(sums + j), count - j);
    }
  }

  // dstats, both in memory and as the next product's operand.
  void sample_backward(int64_t b, int64_t t, bool next) const {
    const int64_t width = p.statistics();
    const Real* grad_stats = p.grad_stats ? row<Real>(p.grad_stats, at(b, t), width) : nullptr;
    const Real* grad = next           ? dz + b * p.latents()
                       : p.grad_stoch ? row<Real>(p.grad_stoch, at(b, t), p.latents())
                                      : nullptr;
    T* to = row<T>(p.dstats, at(b, t), width);
    const auto write = [&](int64_t j, Vector<Real> x, int64_t left) {
      store_some(to + j, x, left);
      store_operand_some<T>(dstats[b] + j, x, left);
    };
    if (through_stoch() && grad != nullptr) {
      const Real* stats = row<Real>(p.stats_trace, at(b, t), width);
      latents_backward(latent_shape(p), stats, grad, latent_noise<Real>(p, b, t), grad_stats, write);
      return;
    }
    for (int64_t j = 0; j < width; j += kLanes) {
      write(j, grad_or_zeros(p.grad_stats, at(b, t), width, j, width - j), width - j);
    }
  }

  void write_dy(int64_t t, int64_t b, int64_t column, int64_t count, const Real* sums) const {
    const T* y = row<T>(p.y_trace, at(b, t), p.hidden) + column;
    T* to = row<T>(p.dy, at(b, t), p.hidden) + column;
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vector<Real> grad = load(sums + j) * elu_grad(load_some(y + j, count - j));
      store_some(to + j, grad, count - j);
      store_operand_some<T>(dy[b] + column + j, grad, count - j);
    }
  }

  void write_dh(int64_t t, int64_t b, int64_t column, int64_t count, const Real* sums) const {
    const int64_t first = b * p.deter + column;
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vector<Real> grad = grad_or_zeros(p.grad_deter, at(b, t), p.deter, column + j, count - j);
      store_some(dh + first + j, grad + load(sums + j) + load_some(carry + first + j, count - j), count - j);
    }
  }

  void update_backward(int64_t group, int64_t b, int64_t t) const {
    const int64_t deter = p.deter;
    const Real* parts = row<Real>(p.parts_trace, at(b, t), 3 * deter);
    const Real* kept = row<Real>(p.norm_trace, at(b, t), 2);
    const Norm<Real> norm{kept[0], kept[1]};
    const bool keep = p.keep[at(b, t)];
    const Real* state = state_before<Real>(p, b, t);
    Vector<Real> total = {}, dot = {};  // of the gradients of normalised parts, and times these
    for (int64_t j = 0; j < deter; j += kLanes) {
      const int64_t left = deter - j;
      const Gates<Real> g = gates(parts, norm, scale, offset, deter, j);
      const Vector<Real> before = keep ? load_some(state + j, left) : Vector<Real>{};
      const Vector<Real> dh_row = load_some(dh + b * deter + j, left);
      store_some(carry + b * deter + j, (1 - g.update) * dh_row, left);
      const Vector<Real> dproposal = dh_row * g.update * (1 - g.proposal * g.proposal);
      const Vector<Real> dnorm[3] = {dproposal * g.candidate * g.reset * (1 - g.reset), dproposal * g.reset,
                                     dh_row * (g.proposal - before) * g.update * (1 - g.update)};
      for (int i = 0; i < 3; ++i) {
        const int64_t unit = i * deter + j, sums = group * 3 * deter + unit;
        store_some(scale_sums + sums, load_some(scale_sums + sums, left) + dnorm[i] * g.normed[i], left);
        store_some(offset_sums + sums, load_some(offset_sums + sums, left) + dnorm[i], left);
        const Vector<Real> dnormed_ = dnorm[i] * scale.at(unit);
        total += dnormed_;
        dot += dnormed_ * g.normed[i];
        store_some(dnormed + b * 3 * deter + unit, dnormed_, left);
      }
    }
    const Real mean = sum(total) / (3 * deter), slope = sum(dot) / (3 * deter);
    T* to = row<T>(p.dparts, at(b, t), 3 * deter);
    for (int64_t j = 0; j < 3 * deter; j += kLanes) {
      const int64_t left = 3 * deter - j;
      const Vector<Real> normed = (load_some(parts + j, left) - norm.mean) * norm.rstd;
      const Vector<Real> grad = norm.rstd * (load_some(dnormed + b * 3 * deter + j, left) - mean - normed * slope);
      store_some(to + j, grad, left);
      store_operand_some<T>(dparts[b] + j, grad, left);
    }
  }

  // The GRU's operand was [x, keep·h]: its first columns are x.
  void write_dx_and_carry(int64_t t, int64_t b, int64_t column, int64_t count, const Real* sums) const {
    const int64_t hidden = column >= p.hidden ? 0 : column + count <= p.hidden ? count : p.hidden - column;
    if (hidden > 0) write_dx(t, b, column, hidden, sums);
    if (hidden < count) write_carry(t, b, column + hidden - p.hidden, count - hidden, sums + hidden);
  }

  void write_dx(int64_t t, int64_t b, int64_t column, int64_t count, const Real* sums) const {
    const T* x = row<T>(p.x_trace, at(b, t), p.hidden) + column;
    T* to = row<T>(p.dx, at(b, t), p.hidden) + column;
    const bool keep = p.keep[at(b, t)];
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vector<Real> grad = load_some(sums + j, count - j) * elu_grad(load_some(x + j, count - j));
      store_some(to + j, grad, count - j);
      store_operand_some<T>(dx[b] + column + j, keep ? grad : Vector<Real>{}, count - j);
    }
  }

  void write_carry(int64_t t, int64_t b, int64_t column, int64_t count, const Real* sums) const {
    Real* to = carry + b * p.deter + column;
    const bool keep = p.keep[at(b, t)];
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vector<Real> grad = load_some(sums + j, count - j) + load_some(to + j, count - j);
      store_some(to + j, keep ? grad : Vector<Real>{}, count - j);
    }
  }

  void finish(const Team& team) const {
    const Range rows = share(p.batch, team), columns = share(panels(3 * p.deter, kLanes), team);
    const int64_t first = rows.begin * p.deter;
    __builtin_memcpy(static_cast<Real*>(p.dstart) + first, carry + first, (rows.end - rows.begin) * p.deter * sizeof(Real));
    for (int64_t j = columns.begin * kLanes; j < columns.end * kLanes && j < 3 * p.deter; j += kLanes) {
      const int64_t left = 3 * p.deter - j;
      Vector<Real> scales = {}, offsets = {};
      for (int64_t g = 0; g < groups; ++g) {
        scales += load_some(scale_sums + g * 3 * p.deter + j, left);
        offsets += load_some(offset_sums + g * 3 * p.deter + j, left);
      }
      store_some(static_cast<Real*>(p.dnorm_weight) + j, scales, left);
      store_some(static_cast<Real*>(p.dnorm_bias) + j, offsets, left);
    }
  }
};

template <class T>
int64_t bytes(const ObserveProblem& problem) {
  Arena count{nullptr};
  Backward<T>(problem, count);
  return count.used;
}

template <class T>
void run(const ObserveProblem& problem, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  const Backward<T> backward(problem, arena);
  run_team(problem.threads, [&](const Team& team) { backward.run(team); });
}

}  // namespace

const ByDtype<Pass<ObserveProblem>> observe_backward =
    {{bytes<float>, run<float>}, {bytes<double>, run<double>}, {bytes<Bf16>, run<Bf16>}};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
