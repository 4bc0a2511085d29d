// The recurrence forward, see rssm_observe.h. A step t has five phases (Gaussian latents: six), a barrier after each:
//
//     rows      z_{t-1} = sample(stats_{t-1});  [x_t, keep_t·h_{t-1}], the GRU's operand; x_t by gathering W_stoch's rows
//     (columns  x_t of Gaussian latents: a product)
//     columns   parts_t = W_gru [x_t, keep_t·h_{t-1}] + b
//     rows      h_t = gates(LayerNorm(parts_t), keep_t·h_{t-1})
//     columns   y_t = elu(input_obs_t + W_obs h_t)
//     columns   stats_t = W_dist y_t + b
#include "shared.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

template <class T>
struct Forward {
  using Real = Wide<T>;
  static constexpr int64_t kLanes = kWidth<Real>;

  const ObserveProblem& p;
  Widened<T> gru_bias, scale, offset, dist_bias;
  Packed<T> gru, obs, dist, from_stoch;  // from_stoch: Gaussian
  T* stoch_rows;                         // categorical: W_stochᵀ, [L, H]
  int32_t* chosen;                       // categorical: [B, S], the classes
  Operands<T> input, deter, hidden, stoch;

  Forward(const ObserveProblem& p, Arena& arena)
      : p(p),
        gru_bias(arena, 3 * p.deter),
        scale(arena, 3 * p.deter),
        offset(arena, 3 * p.deter),
        dist_bias(arena, p.statistics()),
        gru(arena, p.hidden + p.deter, 3 * p.deter),
        obs(arena, p.deter, p.hidden),
        dist(arena, p.hidden, p.statistics()),
        from_stoch(arena, p.stoch, p.discrete ? 0 : p.hidden),
        stoch_rows(arena.take<T>(p.discrete ? p.latents() * p.hidden : 0)),
        chosen(arena.take<int32_t>(p.discrete ? p.batch * p.stoch : 0)),
        input(arena, p.batch, p.hidden + p.deter),
        deter(arena, p.batch, p.deter),
        hidden(arena, p.batch, p.hidden),
        stoch(arena, p.discrete ? 0 : p.batch, p.stoch) {}

  void run(const Team& team) const {
    prepare(team);
    team.barrier();
    for (int64_t t = 0; t < p.length; ++t) step(team, t);
    const Range rows = share(p.batch, team);
    for (int64_t b = rows.begin; b < rows.end; ++b) sample(b, p.length - 1);
  }

  void prepare(const Team& team) const {
    if (team.rank == 0) {
      gru_bias.fill(p.gru_bias);
      scale.fill(p.norm_weight);
      offset.fill(p.norm_bias);
      dist_bias.fill(p.dist_bias);
    }
    pack_weight(team, p.weight_gru, gru);
    pack_weight(team, p.weight_obs, obs);
    pack_weight(team, p.weight_dist, dist);
    if (p.discrete) {
      transpose_stoch(team);
    } else {
      pack_weight(team, p.weight_stoch, from_stoch);
    }
    for (const Operands<T>* x : {&input, &deter, &hidden, &stoch}) x->clear(team);
  }

  // In squares, so that both sides are read and written in whole cache lines.
  void transpose_stoch(const Team& team) const {
    constexpr int64_t side = 64 / sizeof(T);
    const Weight& w = p.weight_stoch;
    const T* from = static_cast<const T*>(w.data);
    const Range mine = share(panels(p.latents(), side), team);
    for (int64_t first = mine.begin * side; first < mine.end * side && first < p.latents(); first += side) {
      const int64_t last = first + side < p.latents() ? first + side : p.latents();
      for (int64_t begin = 0; begin < p.hidden; begin += side) {
        const int64_t end = begin + side < p.hidden ? begin + side : p.hidden;
        for (int64_t l = first; l < last; ++l) {
          for (int64_t h = begin; h < end; ++h) {
            stoch_rows[l * p.hidden + h] = from[h * w.row_stride + l * w.column_stride];
          }
        }
      }
    }
  }

  void step(const Team& team, int64_t t) const {
    const Range rows = share(p.batch, team);
    const bool reverse = t % 2 == 1;
    for (int64_t b = rows.begin; b < rows.end; ++b) begin_row(b, t);
    team.barrier();
    if (!p.discrete) {
      if (t > 0) from_stoch.multiply(team, stoch, reverse, [&](auto... at) { dense_x(t, at...); });
      team.barrier();
    }
    gru.multiply(team, input, reverse, [&](auto... at) { write_parts(t, at...); });
    team.barrier();
    for (int64_t b = rows.begin; b < rows.end; ++b) update_row(b, t);
    team.barrier();
    obs.multiply(team, deter, reverse, [&](auto... at) { write_y(t, at...); });
    team.barrier();
    dist.multiply(team, hidden, reverse, [&](auto... at) { write_stats(t, at...); });
    team.barrier();
  }

  int64_t at(int64_t b, int64_t t) const { return b * p.length + t; }

  void sample(int64_t b, int64_t t) const {
    const Real* stats = row<Real>(p.stats_trace, at(b, t), p.statistics());
    Real* out = row<Real>(p.stoch_trace, at(b, t), p.latents());
    int32_t* choice = p.discrete ? chosen + b * p.stoch : nullptr;
    sample_latents(latent_shape(p), stats, latent_noise<Real>(p, b, t), out, choice);
  }

  void begin_row(int64_t b, int64_t t) const {
    const bool keep = p.keep[at(b, t)];
    if (t > 0) sample(b, t - 1);
    if (p.discrete || t == 0) {
      gather_x(b, t, keep && t > 0);
    } else if (keep) {
      to_operands<T>(row<Real>(p.stoch_trace, at(b, t - 1), p.stoch), p.stoch, stoch[b]);
    } else {
      __builtin_memset(stoch[b], 0, p.stoch * sizeof(Element<T>));
    }
    const Real* state = state_before<Real>(p, b, t);
    for (int64_t j = 0; j < p.deter; j += kLanes) {
      const Vector<Real> h = keep ? load_some(state + j, p.deter - j) : Vector<Real>{};
      store_operand_some<T>(input[b] + p.hidden + j, h, p.deter - j);
    }
  }

  // x = elu(input_x + the chosen rows of W_stochᵀ).
  void gather_x(int64_t b, int64_t t, bool gather) const {
    constexpr int kVectors = 4;
    const T* in = row<T>(p.input_x, at(b, t), p.hidden);
    const int64_t choices = gather ? p.stoch : 0;
    const int32_t* choice = chosen + b * p.stoch;
    int64_t j = 0;
    for (; j + kVectors * kLanes <= p.hidden; j += kVectors * kLanes) {
      Vector<Real> x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = load(in + j + v * kLanes);
      for (int64_t s = 0; s < choices; ++s) {
        const T* from = row<T>(stoch_rows, s * p.discrete + choice[s], p.hidden) + j;
        for (int v = 0; v < kVectors; ++v) x[v] += load(from + v * kLanes);
      }
      for (int v = 0; v < kVectors; ++v) write_x(b, t, j + v * kLanes, x[v], kLanes);
    }
    for (; j < p.hidden; j += kLanes) {
      Vector<Real> x = load_some(in + j, p.hidden - j);
      for (int64_t s = 0; s < choices; ++s) x += load_some(row<T>(stoch_rows, s * p.discrete + choice[s], p.hidden) + j, p.hidden - j);
      write_x(b, t, j, x, p.hidden - j);
    }
  }

  void write_x(int64_t b, int64_t t, int64_t j, Vector<Real> before_elu, int64_t left) const {
    const Vector<Real> x = elu(before_elu);
    store_some(row<T>(p.x_trace, at(b, t), p.hidden) + j, x, left);
    store_operand_some<T>(input[b] + j, x, left);
  }

  void dense_x(int64_t t, int64_t b, int64_t column, int64_t count, const Real* sums) const {
    const T* in = row<T>(p.input_x, at(b, t), p.hidden) + column;
    for (int64_t j = 0; j < count; j += kLanes) {
      write_x(b, t, column + j, load_some(in + j, count - j) + load(sums + j), count - j);
    }
  }

  void write_parts(int64_t t, int64_t b, int64_t column, int64_t count, const Real* sums) const {
    Real* parts = row<Real>(p.parts_trace, at(b, t), 3 * p.deter) + column;
    for (int64_t j = 0; j < count; j += kLanes) {
      store_some(parts + j, load(sums + j) + gru_bias.at(column + j), count - j);
    }
  }

  void update_row(int64_t b, int64_t t) const {
    const Real* parts = row<Real>(p.parts_trace, at(b, t), 3 * p.deter);
    const Norm<Real> norm = layer_norm(parts, 3 * p.deter);
    Real* kept = row<Real>(p.norm_trace, at(b, t), 2);
    kept[0] = norm.mean;
    kept[1] = norm.rstd;
    const bool keep = p.keep[at(b, t)];
    const Real* state = state_before<Real>(p, b, t);
    Real* out = row<Real>(p.deter_trace, at(b, t), p.deter);
    for (int64_t j = 0; j < p.deter; j += kLanes) {
      const int64_t left = p.deter - j;
      const Gates<Real> g = gates(parts, norm, scale, offset, p.deter, j);
      const Vector<Real> was = keep ? load_some(state + j, left) : Vector<Real>{};
      const Vector<Real> h = g.update * g.proposal + (1 - g.update) * was;
      store_some(out + j, h, left);
      store_operand_some<T>(deter[b] + j, h, left);
    }
  }

  void write_y(int64_t t, int64_t b, int64_t column, int64_t count, const Real* sums) const {
    const T* in = row<T>(p.input_obs, at(b, t), p.hidden) + column;
    T* trace = row<T>(p.y_trace, at(b, t), p.hidden) + column;
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vector<Real> y = elu(load_some(in + j, count - j) + load(sums + j));
      store_some(trace + j, y, count - j);
      store_operand_some<T>(hidden[b] + column + j, y, count - j);
    }
  }

  void write_stats(int64_t t, int64_t b, int64_t column, int64_t count, const Real* sums) const {
    Real* stats = row<Real>(p.stats_trace, at(b, t), p.statistics()) + column;
    for (int64_t j = 0; j < count; j += kLanes) {
      store_some(stats + j, load(sums + j) + dist_bias.at(column + j), count - j);
    }
  }
};

template <class T>
int64_t bytes(const ObserveProblem& problem) {
  Arena count{nullptr};
  Forward<T>(problem, count);
  return count.used;
}

template <class T>
void run(const ObserveProblem& problem, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  const Forward<T> forward(problem, arena);
  run_team(problem.threads, [&](const Team& team) { forward.run(team); });
}

}  // namespace

const ByDtype<Pass<ObserveProblem>> observe_forward =
    {{bytes<float>, run<float>}, {bytes<double>, run<double>}, {bytes<Bf16>, run<Bf16>}};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
