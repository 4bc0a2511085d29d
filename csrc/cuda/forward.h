// The posterior scan: T steps of five phases, a barrier of the grid after each; see apv_fast/recurrence/phases.py.
//
//   1  x     its latents from every block's best candidates; a sum of rows of stoch_weight        tiles of H
//   2  parts the GRU's product; the h part was made after phase 4 of the step before              tiles of D
//   3  h     LayerNorm from every tile's statistics; gates
//   4  y     product with h                                                                       tiles of H
//   5  stats product with y; each tile's best class (or Gaussian sample)                          tiles of statistics
//
// What the next product reads is published in the workspace, in layout.h's order. A buffer is written in one phase and
// read in the next (h: until before the barrier of phase 5), four barriers before it is written again, so there is one
// of each.
#pragma once

#include "forward_plan.h"
#include "walk.h"

namespace apv_fast::cuda {

template <class X>
struct Forward : Walk<X> {
  using Base = Walk<X>;
  using Base::barrier, Base::each_item, Base::n, Base::pairs, Base::published, Base::quads, Base::rows, Base::scan,
      Base::shared, Base::step_of;

  const ForwardPlan& plan;
  const ForwardShares own;

  APV_DEVICE Forward(const ApvScan& scan, const ForwardPlan& plan)
      : Base(scan, plan.counter), plan(plan), own(n, division_of(scan, plan.shared_weights)) {}

  APV_DEVICE Quad* weights() const { return quads(plan.weights); }
  APV_DEVICE const float* keep(int t) const { return shared(plan.shared_keep) + t % 2 * X::kRows; }

  APV_DEVICE void run() {
    begin();
    barrier.arrive();
    load_weights();
    stage_keep(0);
    stage_x(0);
    barrier.wait(kFaultStart);
    hidden_part(0);
    for (int t = 0; t < n.T; ++t) {
      input(t);
      barrier.arrive();
      if (t > 0) write_latents(t - 1);
      stage_keep(t + 1);
      barrier.wait(1);
      parts(t);
      barrier.arrive();
      stage_obs(t);
      barrier.wait(2);
      deter(t);
      barrier.arrive();
      stage_noise(t);
      barrier.wait(3);
      observe(t);
      barrier.arrive();
      stage_x(t + 1);
      hidden_part(t + 1);
      barrier.wait(4);
      statistics(t);
      barrier.arrive();
      barrier.wait(5);
    }
    choose_latents(n.T - 1);
    write_latents(n.T - 1);
  }

  // Constants and the first h of the block's own units.
  APV_DEVICE void begin() {
    for (int slot = 0; slot < own.gru.count; ++slot) {
      const int tile = own.gru.tile(slot);
      float* constants = shared(plan.shared_gates) + slot * 9 * kTile;
      for (int i = thread(); i < 3 * kTile; i += X::kThreads) {
        const int d = tile * kTile + i % kTile, at = i / kTile * n.D + d;
        constants[i] = d < n.D ? widen(scan.gru_bias[at]) : 0;
        constants[3 * kTile + i] = d < n.D ? widen(scan.norm_weight[at]) : 0;
        constants[6 * kTile + i] = d < n.D ? widen(scan.norm_bias[at]) : 0;
      }
      each_item([&](int item, int row, int unit) {
        const int d = tile * kTile + unit;
        const float h = row < n.B && d < n.D ? scan.start[int64_t{row} * n.D + d] : 0;
        shared(plan.shared_deter)[slot * X::kItems + item] = h;
        if (row < n.B && d < n.D) *published(plan.deter, row, tile, unit) = narrow(h);
      });
    }
    for (int slot = 0; slot < own.dist.count; ++slot) {
      for (int i = thread(); i < kTile; i += X::kThreads) {
        const int row = n.stats_row(own.dist.tile(slot), i);
        shared(plan.shared_bias)[slot * kTile + i] = row >= 0 ? widen(scan.dist_bias[row]) : 0;
      }
    }
  }

  APV_DEVICE void load_weights() {
    load_tiles<X::kThreads>(own.gru, n.hidden_steps() + n.deter_steps(), weights(), GruForward{scan.gru_weight, n});
    load_tiles<X::kThreads>(own.obs, n.deter_steps(), weights(), ObsForward{scan.obs_weight, n});
    load_tiles<X::kThreads>(own.dist, n.hidden_steps(), weights(), DistForward{scan.dist_weight, n});
    load_rows<X::kThreads>(own.stoch, weights(), StochForward{scan.stoch_weight, n});
  }

  // What a step adds is brought to shared memory while the block would wait anyway.
  APV_DEVICE void stage_keep(int t) { Base::stage_keep(shared(plan.shared_keep), t); }
  APV_DEVICE void stage_x(int t) { this->stage_rows(shared(plan.shared_x), own.stoch, scan.input_x, t); }
  APV_DEVICE void stage_obs(int t) { this->stage_rows(shared(plan.shared_obs), own.obs, scan.input_obs, t); }
  APV_DEVICE void stage_noise(int t) {
    if (!this->sampled()) return;
    for (int slot = 0; slot < own.dist.count; ++slot) {
      each_item([&](int item, int row, int unit) {
        const int index = n.stats_row(own.dist.tile(slot), unit);
        const bool some = row < n.B && index >= 0 && index < n.L();  // a Gaussian's deviation has none
        shared(plan.shared_noise)[slot * X::kItems + item] = some ? this->noise_at(row, t, index) : 0;
      });
    }
  }

  // The GRU's product with keep_t·h_{t-1}.
  APV_DEVICE void hidden_part(int t) {
    if (t >= n.T) return;
    float* partial = shared(plan.shared_partial);
    const int stride = n.hidden_steps() + n.deter_steps();
    for (int slot = 0; slot < own.gru.count; ++slot) {
      product<X, 3>(partial, rows(plan.deter, n.deter_steps()), weights_of(own.gru, slot, weights()),
                    slot < own.gru.resident, stride, n.hidden_steps());
      float* hidden = shared(plan.shared_hidden) + slot * 3 * X::kItems;
      each_item([&](int item, int row, int) {
        APV_UNROLL
        for (int gate = 0; gate < 3; ++gate) {
          hidden[gate * X::kItems + item] = keep(t)[row] != 0 ? total<X, 3>(partial, gate, item) : 0;
        }
      });
    }
  }

  // Phase 1.
  APV_DEVICE void input(int t) {
    if (t > 0) choose_latents(t - 1);
    float* partial = shared(plan.shared_partial);
    const int row = thread() / X::kTeam, member = thread() % X::kTeam;
    for (int slot = 0; slot < own.stoch.count; ++slot) {
      const int tile = own.stoch.tile(slot);
      if (t > 0) {
        float sums[kTile] = {};
        if (row < n.B) {
          const Weights from = weights_of(own.stoch, slot, weights());
          if (slot < own.stoch.resident) {
            add_rows<true>(sums, from, row, member);
          } else {
            add_rows<false>(sums, from, row, member);
          }
        }
        sync_threads();
        APV_UNROLL
        for (int unit = 0; unit < kTile; ++unit) {
          const float sum = sum_over<X::kTeam>(sums[unit]);
          if (member == 0) partial[row * kTile + unit] = sum;
        }
        sync_threads();
      }
      each_item([&](int item, int r, int unit) {
        const int h = tile * kTile + unit;
        if (r >= n.B || h >= n.H) return;
        float x = shared(plan.shared_x)[slot * X::kItems + item];
        if (t > 0 && keep(t)[r] != 0) x += partial[item];
        const Half out = narrow(elu(x));
        *published(plan.x, r, tile, unit) = out;
        scan.x_trace[step_of(r, t) * n.H + h] = out;
      });
    }
  }

  // This thread's share of Σ_s z_s·(row of latent s), eight units.
  template <bool RESIDENT>
  APV_DEVICE void add_rows(float (&sums)[kTile], const Weights& from, int row, int member) {
    for (int s = member; s < n.S; s += X::kTeam) {
      const float latent = shared(plan.shared_latent)[row * n.S + s];
      const int l = n.C ? s * n.C + static_cast<int>(float_to_bits(latent)) : s;
      const float scale = n.C ? 1.0f : latent;
      const Quad w = read_weights<RESIDENT>(from, l);
      const uint32_t words[4] = {w.x, w.y, w.z, w.w};
      APV_UNROLL
      for (int i = 0; i < 4; ++i) {
        sums[2 * i] += scale * bits_to_float(words[i] << 16);
        sums[2 * i + 1] += scale * bits_to_float(words[i] & 0xffff0000u);
      }
    }
  }

  static APV_DEVICE bool better(const Pair& a, const Pair& b) {  // (score, class): the first of equals
    return a.first > b.first || (a.first == b.first && float_to_bits(a.second) < float_to_bits(b.second));
  }

  // Every row's latents into shared memory: classes, or Gaussian samples as products see them.
  APV_DEVICE void choose_latents(int t) {
    constexpr int kBatch = 4;
    const int tiles = n.C ? n.class_tiles() : 0;
    float* latent = shared(plan.shared_latent);
    APV_UNROLL_2
    for (int i = thread(); i < n.B * n.S; i += X::kThreads) {
      const int row = i / n.S, s = i % n.S;
      if (!n.C) {
        latent[i] = widen(narrow(load_fresh(scan.stoch_trace + step_of(row, t) * n.S + s)));
        continue;
      }
      const Pair* candidates = pairs(plan.candidates) + row * n.stats_tiles() + s * tiles;
      Pair best = {};
      for (int begin = 0; begin < tiles; begin += kBatch) {
        Pair some[kBatch];
        APV_UNROLL
        for (int j = 0; j < kBatch; ++j) some[j] = load_fresh(candidates + min(begin + j, tiles - 1));
        if (begin == 0) best = some[0];
        APV_UNROLL
        for (int j = 0; j < kBatch; ++j) {
          if (better(some[j], best)) best = some[j];
        }
      }
      latent[i] = best.second;
    }
    sync_threads();
  }

  // One-hots, each class by the block that owns its tile. Gaussian samples were written where they were made.
  APV_DEVICE void write_latents(int t) {
    for (int slot = 0; n.C && slot < own.dist.count; ++slot) {
      const int tile = own.dist.tile(slot), s = tile / n.class_tiles();
      each_item([&](int, int row, int unit) {
        const int c = tile % n.class_tiles() * kTile + unit;
        if (row >= n.B || c >= n.C) return;
        const int chosen = static_cast<int>(float_to_bits(shared(plan.shared_latent)[row * n.S + s]));
        scan.stoch_trace[step_of(row, t) * n.L() + s * n.C + c] = chosen == c ? 1.0f : 0.0f;
      });
    }
  }

  // Phase 2: the GRU's preactivations of the block's own units, and each tile's mean and squared deviations.
  APV_DEVICE void parts(int t) {
    float* partial = shared(plan.shared_partial);
    const int stride = n.hidden_steps() + n.deter_steps();
    for (int slot = 0; slot < own.gru.count; ++slot) {
      const int tile = own.gru.tile(slot);
      product<X, 3>(partial, rows(plan.x, n.hidden_steps()), weights_of(own.gru, slot, weights()),
                    slot < own.gru.resident, stride, 0);
      const float* hidden = shared(plan.shared_hidden) + slot * 3 * X::kItems;
      const float* bias = shared(plan.shared_gates) + slot * 9 * kTile;
      float* parts = shared(plan.shared_parts) + slot * 3 * X::kItems;
      each_item([&](int item, int row, int unit) {
        const int d = tile * kTile + unit;
        const bool inside = d < n.D;
        float part[3], sum = 0, squares = 0;
        APV_UNROLL
        for (int gate = 0; gate < 3; ++gate) {
          part[gate] = total<X, 3>(partial, gate, item) + hidden[gate * X::kItems + item] + bias[gate * kTile + unit];
          parts[gate * X::kItems + item] = part[gate];
          sum += inside ? part[gate] : 0;
        }
        const float mean = sum_over<kTile>(sum) / (3 * min(n.D - tile * kTile, kTile));
        APV_UNROLL
        for (int gate = 0; gate < 3; ++gate) squares += inside ? (part[gate] - mean) * (part[gate] - mean) : 0;
        squares = sum_over<kTile>(squares);
        if (row >= n.B) return;
        if (unit == 0) pairs(plan.moments)[row * n.deter_tiles() + tile] = {mean, squares};
        APV_UNROLL
        for (int gate = 0; gate < 3 && inside; ++gate) {
          scan.parts_trace[step_of(row, t) * 3 * n.D + gate * n.D + d] = part[gate];
        }
      });
    }
  }

  // Phase 3.
  APV_DEVICE void deter(int t) {
    normalise(t);
    const Pair* norm = reinterpret_cast<const Pair*>(shared(plan.shared_norm));
    for (int slot = 0; slot < own.gru.count; ++slot) {
      const int tile = own.gru.tile(slot);
      const float* scale = shared(plan.shared_gates) + (slot * 9 + 3) * kTile;
      const float* offset = scale + 3 * kTile;
      const float* parts = shared(plan.shared_parts) + slot * 3 * X::kItems;
      each_item([&](int item, int row, int unit) {
        const int d = tile * kTile + unit;
        if (row >= n.B || d >= n.D) return;
        float normed[3];
        APV_UNROLL
        for (int gate = 0; gate < 3; ++gate) {
          const int i = gate * kTile + unit;
          normed[gate] = (parts[gate * X::kItems + item] - norm[row].first) * norm[row].second * scale[i] + offset[i];
        }
        float& h = shared(plan.shared_deter)[slot * X::kItems + item];
        h = next_deter(gates(normed[0], normed[1], normed[2]), keep(t)[row] != 0 ? h : 0);
        *published(plan.deter, row, tile, unit) = narrow(h);
        scan.deter_trace[step_of(row, t) * n.D + d] = h;
      });
    }
  }

  // LayerNorm's mean and 1/std of every row, from every tile's; each block makes them for itself, in the same order.
  APV_DEVICE void normalise(int t) {
    constexpr int kBatch = X::kBatch;
    const int row = thread() / X::kTeam, member = thread() % X::kTeam, tiles = n.deter_tiles();
    const Pair* all = pairs(plan.moments) + min(row, n.B - 1) * tiles;
    const float pivot = load_fresh(all).first;
    Moments moments = {};
    for (int begin = member; begin < tiles; begin += kBatch * X::kTeam) {
      Pair some[kBatch];
      APV_UNROLL
      for (int i = 0; i < kBatch; ++i) some[i] = load_fresh(all + min(begin + i * X::kTeam, tiles - 1));
      APV_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const int tile = begin + i * X::kTeam;
        const float count = 3.0f * min(n.D - tile * kTile, kTile);
        if (tile < tiles) moments.add(count, some[i].first - pivot, some[i].second);
      }
    }
    moments.first = sum_over<X::kTeam>(moments.first);
    moments.second = sum_over<X::kTeam>(moments.second);
    moments.within = sum_over<X::kTeam>(moments.within);
    if (member == 0) {
      const Norm norm = norm_of(moments, 3.0f * n.D, pivot);
      reinterpret_cast<Pair*>(shared(plan.shared_norm))[row] = {norm.mean, norm.rstd};
      if (block() == 0 && row < n.B) {
        reinterpret_cast<Pair*>(scan.norm_trace)[step_of(row, t)] = {norm.mean, norm.rstd};
      }
    }
    sync_threads();
  }

  // Phase 4.
  APV_DEVICE void observe(int t) {
    float* partial = shared(plan.shared_partial);
    for (int slot = 0; slot < own.obs.count; ++slot) {
      const int tile = own.obs.tile(slot);
      product<X, 1>(partial, rows(plan.deter, n.deter_steps()), weights_of(own.obs, slot, weights()),
                    slot < own.obs.resident, n.deter_steps(), 0);
      each_item([&](int item, int row, int unit) {
        const int h = tile * kTile + unit;
        if (row >= n.B || h >= n.H) return;
        const Half y = narrow(elu(shared(plan.shared_obs)[slot * X::kItems + item] + total<X, 1>(partial, 0, item)));
        *published(plan.y, row, tile, unit) = y;
        scan.y_trace[step_of(row, t) * n.H + h] = y;
      });
    }
  }

  // Phase 5.
  APV_DEVICE void statistics(int t) {
    float* partial = shared(plan.shared_partial);
    const bool sampled = this->sampled();
    for (int slot = 0; slot < own.dist.count; ++slot) {
      const int tile = own.dist.tile(slot);
      product<X, 1>(partial, rows(plan.y, n.hidden_steps()), weights_of(own.dist, slot, weights()),
                    slot < own.dist.resident, n.hidden_steps(), 0);
      each_item([&](int item, int row, int unit) {
        const int index = n.stats_row(tile, unit);
        const bool inside = row < n.B && index >= 0;
        const float noise = sampled ? shared(plan.shared_noise)[slot * X::kItems + item] : 0;
        const float value = total<X, 1>(partial, 0, item) + shared(plan.shared_bias)[slot * kTile + unit];
        if (inside) scan.stats_trace[step_of(row, t) * n.M() + index] = value;
        if (n.C) {
          offer(tile, row, unit, index >= 0 ? value + noise : -INFINITY);
        } else {
          const float raw = shuffle_xor(value, 1);
          if (inside && unit % 2 == 0) {
            const float z = sampled ? value + deviation(raw, static_cast<float>(scan.min_std)) * noise : value;
            scan.stoch_trace[step_of(row, t) * n.S + index] = z;
          }
        }
      });
    }
  }

  // The best of a tile's eight classes.
  APV_DEVICE void offer(int tile, int row, int unit, float score) {
    Pair best = {score, bits_to_float(tile % n.class_tiles() * kTile + unit)};
    APV_UNROLL
    for (int mask = kTile / 2; mask > 0; mask /= 2) {
      const Pair other = {shuffle_xor(best.first, mask), shuffle_xor(best.second, mask)};
      if (better(other, best)) best = other;
    }
    if (unit == 0 && row < n.B) pairs(plan.candidates)[row * n.stats_tiles() + tile] = best;
  }
};

}  // namespace apv_fast::cuda
