// The scan's way back: T steps of five phases, a barrier of the grid after each; see apv_fast/recurrence/phases.py, whose phase
// 4 is two here, since every gradient of the GRU's preactivations needs its row's sums.
//
//   1  dstats  product with dx_{t+1}; back through the samples; whole latents, for the softmax      groups of latents
//   2  dy      product with dstats                                                                  tiles of H
//   3  dnorm   product with dy, and the carry; back through the gates; each tile's sums             tiles of D
//   4  dparts  back through LayerNorm                                                               tiles of D
//   5  dx      product with dparts; behind the barrier the carry's product                          tiles of H, of D
//
// No atomic adds of numbers: the order of every sum is fixed, so runs are equal bit for bit.
#pragma once

#include "backward_plan.h"
#include "walk.h"

namespace apv_fast::cuda {

template <class X>
struct Backward : Walk<X> {
  using Base = Walk<X>;
  using Base::barrier, Base::each_item, Base::n, Base::pairs, Base::published, Base::quads, Base::rows, Base::scan,
      Base::shared, Base::step_of;

  const BackwardPlan& plan;
  const BackwardShares own;

  APV_DEVICE Backward(const ApvScan& scan, const BackwardPlan& plan)
      : Base(scan, plan.counter), plan(plan), own(n, division_of(scan, plan.shared_weights)) {}

  APV_DEVICE Quad* weights() const { return quads(plan.weights); }
  APV_DEVICE const float* keep(int t) const { return shared(plan.shared_keep) + t % 2 * X::kRows; }
  APV_DEVICE bool through_sample() const { return !n.C || this->sampled(); }

  APV_DEVICE void run() {
    begin();
    load_weights();
    const int last = n.T - 1;
    stage_step(last);
    this->stage_rows(shared(plan.shared_y), own.dist, scan.y_trace, last);
    for (int t = last; t >= 0; --t) {
      stats_grad(t);
      barrier.arrive();
      stage_gates(t);
      barrier.wait(1);
      hidden_grad(t);
      barrier.arrive();
      this->stage_rows(shared(plan.shared_x), own.input, scan.x_trace, t);
      barrier.wait(2);
      deter_grad();
      barrier.arrive();
      stage_step(t - 1);
      barrier.wait(3);
      parts_grad(t);
      barrier.arrive();
      this->stage_rows(shared(plan.shared_y), own.dist, scan.y_trace, t - 1);
      barrier.wait(4);
      input_grad(t);
      barrier.arrive();
      carry_grad(t);
      barrier.wait(5);
    }
    end();
  }

  APV_DEVICE void begin() {
    for (int slot = 0; slot < own.deter.count; ++slot) {
      const int tile = own.deter.tile(slot);
      float* scales = shared(plan.shared_scales) + slot * 6 * kTile;
      for (int i = thread(); i < 3 * kTile; i += X::kThreads) {
        const int d = tile * kTile + i % kTile, from = i / kTile * n.D + d;
        scales[i] = d < n.D ? widen(scan.norm_weight[from]) : 0;
        scales[3 * kTile + i] = d < n.D ? widen(scan.norm_bias[from]) : 0;
      }
      each_item([&](int item, int, int) { shared(plan.shared_carry)[slot * X::kItems + item] = 0; });
      for (int i = 0; i < 6; ++i) {
        if (thread() < X::kWorkers) sums(slot, i)[thread()] = 0;
      }
    }
  }

  // Of one slot's gradients of LayerNorm's weight (i < 3: by gate) and bias, each thread's own sum over rows and steps.
  APV_DEVICE float* sums(int slot, int i) const { return shared(plan.shared_sums) + (slot * 6 + i) * X::kWorkers; }

  APV_DEVICE void load_weights() {
    constexpr int kThreads = X::kThreads;
    load_across<kThreads>(own.input, n.gate_steps(), weights(), GruBackward{scan.gru_weight, n, 0, n.H});
    load_across<kThreads>(own.deter, n.gate_steps(), weights(), GruBackward{scan.gru_weight, n, n.H, n.D});
    load_across<kThreads>(own.obs, n.hidden_steps(), weights(), ObsBackward{scan.obs_weight, n});
    load_across<kThreads>(own.dist, n.stats_steps(), weights(), DistBackward{scan.dist_weight, n});
    load_across<kThreads>(own.stoch, n.hidden_steps(), weights(), StochBackward{scan.stoch_weight, n});
  }

  // For phase 1 of step t: what is known of the latents' gradients, while the block would wait anyway.
  APV_DEVICE void stage_step(int t) {
    if (t < 0) return;
    this->stage_keep(shared(plan.shared_keep), t);
    const int row = thread() / X::kTeam, member = thread() % X::kTeam, width = n.group_width();
    const bool inside = row < n.B;
    const int64_t step = step_of(inside ? row : 0, t);
    for (int slot = 0; slot < own.stoch.count; ++slot) {
      const int group = own.stoch.tile(slot), place = (slot * X::kRows + row) * width;
      float *probs = shared(plan.shared_probs) + place, *latent = shared(plan.shared_latent) + place;
      float* stats = shared(plan.shared_stats) + place * (n.C ? 1 : 2);
      const int first = group * (n.C ? n.C : kTile), count = n.C ? n.C : min(n.S - first, kTile);
      for (int i = member; i < count && inside; i += X::kTeam) {
        const int l = first + i;
        latent[i] = scan.grad_stoch ? scan.grad_stoch[step * n.L() + l] : 0;
        stats[i] = scan.grad_stats ? scan.grad_stats[step * n.M() + l] : 0;
        if (n.C) {
          probs[i] = scan.stats_trace[step * n.M() + l];
        } else {
          stats[width + i] = scan.grad_stats ? scan.grad_stats[step * n.M() + n.S + l] : 0;
          probs[i] = this->noise_at(row, t, l) * deviation_grad(scan.stats_trace[step * n.M() + n.S + l]);
        }
      }
      if (n.C && through_sample()) softmax(probs, inside ? count : 0, member);
    }
  }

  // In place, by a row's team; each thread reads and writes its own classes.
  static APV_DEVICE void softmax(float* probs, int count, int member) {
    float top = -INFINITY, sum = 0;
    for (int c = member; c < count; c += X::kTeam) top = fmaxf(top, probs[c]);
    APV_UNROLL
    for (int mask = X::kTeam / 2; mask > 0; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
    for (int c = member; c < count; c += X::kTeam) sum += probs[c] = expf(probs[c] - top);
    sum = sum_over<X::kTeam>(sum);
    for (int c = member; c < count; c += X::kTeam) probs[c] /= sum;
  }

  // Phase 1.
  APV_DEVICE void stats_grad(int t) {
    for (int slot = 0; slot < own.stoch.count; ++slot) {
      if (t + 1 < n.T && through_sample()) latent_grad(t, slot);
      back_through_sample(t, slot);
    }
  }

  // Adds what comes from the next step's x.
  APV_DEVICE void latent_grad(int t, int slot) {
    for (int slab = 0; slab < n.group_tiles();) {
      const int left = n.group_tiles() - slab;
      if (X::kSlabsAtOnce >= 4 && left >= 4) {
        slab = latent_grad<X::kSlabsAtOnce>(t, slot, slab);
      } else if (left >= 2) {
        slab = latent_grad<2>(t, slot, slab);
      } else {
        slab = latent_grad<1>(t, slot, slab);
      }
    }
    sync_threads();  // a row's team needs all of its classes
  }

  template <int SLABS>
  APV_DEVICE int latent_grad(int t, int slot, int slab) {
    float *partial = shared(plan.shared_partial), *latent = shared(plan.shared_latent);
    const int width = n.group_width();
    product<X, SLABS>(partial, rows(plan.x, n.hidden_steps()), weights_of(own.stoch, slot, weights()),
                      slot < own.stoch.resident, n.hidden_steps(), slab * n.hidden_steps());
    each_item([&](int item, int row, int unit) {
      if (row >= n.B || keep(t + 1)[row] == 0) return;
      APV_UNROLL
      for (int i = 0; i < SLABS; ++i) {
        latent[(slot * X::kRows + row) * width + (slab + i) * kTile + unit] += total<X, SLABS>(partial, i, item);
      }
    });
    return slab + SLABS;
  }

  APV_DEVICE void back_through_sample(int t, int slot) {
    const int row = thread() / X::kTeam, member = thread() % X::kTeam, width = n.group_width();
    const int group = own.stoch.tile(slot), place = (slot * X::kRows + row) * width;
    const float *probs = shared(plan.shared_probs) + place, *latent = shared(plan.shared_latent) + place;
    const float* stats = shared(plan.shared_stats) + place * (n.C ? 1 : 2);
    const int first = group * (n.C ? n.C : kTile), count = n.C ? n.C : min(n.S - first, kTile);
    float dot = 0;
    for (int c = member; c < count && row < n.B && n.C && through_sample(); c += X::kTeam) dot += probs[c] * latent[c];
    dot = sum_over<X::kTeam>(dot);
    if (row >= n.B) return;
    Half* out = scan.dstats + step_of(row, t) * n.M() + first;
    for (int i = member; i < count; i += X::kTeam) {
      if (n.C) {
        const Half grad = narrow(stats[i] + (through_sample() ? probs[i] * (latent[i] - dot) : 0));
        *published(plan.stats, row, group * n.group_tiles() + i / kTile, i % kTile) = grad;
        out[i] = grad;
      } else {
        const Half mean = narrow(stats[i] + latent[i]), raw = narrow(stats[width + i] + probs[i] * latent[i]);
        *published(plan.stats, row, group, i) = mean;
        *published(plan.stats, row, n.groups() + group, i) = raw;
        out[i] = mean;
        out[n.S + i] = raw;
      }
    }
  }

  // Phase 2, and in phase 5: the gradient before ELU of the block's own hidden units, from its product with what is at
  // `from`.
  template <int AHEAD>
  APV_DEVICE void elu_product(const Share& share, int64_t from, int steps, const float* hidden, int64_t to,
                              Half* grads, int t) {
    float* partial = shared(plan.shared_partial);
    for (int slot = 0; slot < share.count; ++slot) {
      const int tile = share.tile(slot);
      product<X, 1, AHEAD>(partial, rows(from, steps), weights_of(share, slot, weights()), slot < share.resident, steps,
                           0);
      each_item([&](int item, int row, int unit) {
        const int h = tile * kTile + unit;
        if (row >= n.B || h >= n.H) return;
        const Half grad = narrow(total<X, 1>(partial, 0, item) * elu_grad(hidden[slot * X::kItems + item]));
        *published(to, row, tile, unit) = grad;
        grads[step_of(row, t) * n.H + h] = grad;
      });
    }
  }

  APV_DEVICE void hidden_grad(int t) {
    elu_product<X::kAhead>(own.dist, plan.stats, n.stats_steps(), shared(plan.shared_y), plan.y, scan.dy, t);
  }

  APV_DEVICE void input_grad(int t) {
    elu_product<X::kAheadLong>(own.input, plan.parts, n.gate_steps(), shared(plan.shared_x), plan.x, scan.dx, t);
  }

  // For phase 3 of step t.
  APV_DEVICE void stage_gates(int t) {
    for (int row = thread(); row < n.B; row += X::kThreads) {
      shared(plan.shared_rstd)[row] = scan.norm_trace[step_of(row, t) * 2 + 1];
    }
    for (int slot = 0; slot < own.deter.count; ++slot) {
      float* normed = shared(plan.shared_normed) + slot * 3 * X::kItems;
      each_item([&](int item, int row, int unit) {
        const int d = own.deter.tile(slot) * kTile + unit, i = slot * X::kItems + item;
        if (row >= n.B || d >= n.D) return;
        const int64_t step = step_of(row, t);
        const float mean = scan.norm_trace[step * 2], rstd = scan.norm_trace[step * 2 + 1];
        APV_UNROLL
        for (int gate = 0; gate < 3; ++gate) {
          normed[gate * X::kItems + item] = (scan.parts_trace[(step * 3 + gate) * n.D + d] - mean) * rstd;
        }
        const float before = t == 0 ? scan.start[int64_t{row} * n.D + d] : scan.deter_trace[(step - 1) * n.D + d];
        shared(plan.shared_before)[i] = keep(t)[row] != 0 ? before : 0;
        shared(plan.shared_grad_deter)[i] = scan.grad_deter ? scan.grad_deter[step * n.D + d] : 0;
      });
    }
  }

  // Phase 3.
  APV_DEVICE void deter_grad() {
    float* partial = shared(plan.shared_partial);
    for (int slot = 0; slot < own.obs.count; ++slot) {
      const int tile = own.obs.tile(slot);
      product<X, 1>(partial, rows(plan.y, n.hidden_steps()), weights_of(own.obs, slot, weights()),
                    slot < own.obs.resident, n.hidden_steps(), 0);
      each_item([&](int item, int row, int unit) {
        Pair both = {};
        if (row < n.B && tile * kTile + unit < n.D) both = gate_grads(slot, item, unit, total<X, 1>(partial, 0, item));
        both = {sum_over<kTile>(both.first), sum_over<kTile>(both.second)};
        if (unit == 0 && row < n.B) pairs(plan.sums)[row * n.deter_tiles() + tile] = both;
      });
    }
  }

  // Of one unit: gradients of its three normalised parts, and their sums, plain and with the parts themselves.
  APV_DEVICE Pair gate_grads(int slot, int item, int unit, float through_y) {
    const int i = slot * X::kItems + item;
    const float* normed = shared(plan.shared_normed) + slot * 3 * X::kItems + item;
    const float* scales = shared(plan.shared_scales) + slot * 6 * kTile + unit;
    float* grads = shared(plan.shared_grad) + slot * 3 * X::kItems + item;
    float scaled[3], dnorm[3];
    APV_UNROLL
    for (int gate = 0; gate < 3; ++gate) {
      scaled[gate] = normed[gate * X::kItems] * scales[gate * kTile] + scales[(3 + gate) * kTile];
    }
    const Gates g = gates(scaled[0], scaled[1], scaled[2]);
    const float dh = shared(plan.shared_carry)[i] + through_y + shared(plan.shared_grad_deter)[i];
    gates_backward(g, shared(plan.shared_before)[i], dh, dnorm);
    shared(plan.shared_rest)[i] = (1 - g.update) * dh;
    Pair both = {};
    APV_UNROLL
    for (int gate = 0; gate < 3; ++gate) {
      const float x = normed[gate * X::kItems], grad = dnorm[gate] * scales[gate * kTile];
      sums(slot, gate)[thread()] += dnorm[gate] * x;
      sums(slot, 3 + gate)[thread()] += dnorm[gate];
      grads[gate * X::kItems] = grad;
      both.first += grad;
      both.second += grad * x;
    }
    return both;
  }

  // Phase 4.
  APV_DEVICE void parts_grad(int t) {
    row_means();
    const Pair* means = reinterpret_cast<const Pair*>(shared(plan.shared_means));
    for (int slot = 0; slot < own.deter.count; ++slot) {
      const int tile = own.deter.tile(slot);
      each_item([&](int item, int row, int unit) {
        const int d = tile * kTile + unit;
        if (row >= n.B || d >= n.D) return;
        APV_UNROLL
        for (int gate = 0; gate < 3; ++gate) {
          const int i = (slot * 3 + gate) * X::kItems + item;
          const float x = shared(plan.shared_normed)[i], grad = shared(plan.shared_grad)[i];
          const Half dpart = narrow(shared(plan.shared_rstd)[row] * (grad - means[row].first - x * means[row].second));
          *published(plan.parts, row, gate * n.deter_tiles() + tile, unit) = dpart;
          scan.dparts[(step_of(row, t) * 3 + gate) * n.D + d] = dpart;
        }
      });
    }
  }

  // Of the gradients of a row's normalised parts, plain and with the parts; each block for itself, in the same order.
  APV_DEVICE void row_means() {
    constexpr int kBatch = X::kBatch;
    const int row = thread() / X::kTeam, member = thread() % X::kTeam, tiles = n.deter_tiles();
    const Pair* all = pairs(plan.sums) + min(row, n.B - 1) * tiles;
    Pair sum = {};
    for (int begin = member; begin < tiles; begin += kBatch * X::kTeam) {
      Pair some[kBatch];
      APV_UNROLL
      for (int i = 0; i < kBatch; ++i) some[i] = load_fresh(all + min(begin + i * X::kTeam, tiles - 1));
      APV_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (begin + i * X::kTeam >= tiles) continue;
        sum.first += some[i].first;
        sum.second += some[i].second;
      }
    }
    sum = {sum_over<X::kTeam>(sum.first), sum_over<X::kTeam>(sum.second)};
    const float count = 3.0f * n.D;
    if (member == 0) reinterpret_cast<Pair*>(shared(plan.shared_means))[row] = {sum.first / count, sum.second / count};
    sync_threads();
  }

  // Behind phase 5: what the step before receives as its h's gradient.
  APV_DEVICE void carry_grad(int t) {
    float* partial = shared(plan.shared_partial);
    for (int slot = 0; slot < own.deter.count; ++slot) {
      product<X, 1, X::kAheadLong>(partial, rows(plan.parts, n.gate_steps()), weights_of(own.deter, slot, weights()),
                                   slot < own.deter.resident, n.gate_steps(), 0);
      each_item([&](int item, int row, int) {
        const int i = slot * X::kItems + item;
        const float carry = total<X, 1>(partial, 0, item) + shared(plan.shared_rest)[i];
        shared(plan.shared_carry)[i] = keep(t)[row] != 0 ? carry : 0;
      });
    }
  }

  APV_DEVICE void end() {
    for (int slot = 0; slot < own.deter.count; ++slot) {
      const int tile = own.deter.tile(slot);
      each_item([&](int item, int row, int unit) {
        const int d = tile * kTile + unit;
        if (row < n.B && d < n.D)
          scan.dstart[int64_t{row} * n.D + d] = shared(plan.shared_carry)[slot * X::kItems + item];
      });
      for (int i = thread(); i < 6 * kTile; i += X::kThreads) {
        const int which = i / kTile, d = tile * kTile + i % kTile;
        if (d >= n.D) continue;
        float sum = 0;
        for (int j = i % kTile; j < X::kWorkers; j += kTile) sum += sums(slot, which)[j];
        float* to = (which < 3 ? scan.dnorm_weight : scan.dnorm_bias) + which % 3 * n.D + d;
        *to = scan.accumulate ? *to + sum : sum;
      }
    }
  }
};

}  // namespace apv_fast::cuda
