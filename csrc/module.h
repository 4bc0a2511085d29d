// The Python module apv_fast._C, op by op: every op's functions are defined in its folder's bind.cpp, what several ops
// share in cpu/parts/bind.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace apv_fast {

void bind_image_loss(pybind11::module_& module);     // and normalize_image
void bind_image_model(pybind11::module_& module);    // image_encoder, image_decoder
void bind_keras_adam(pybind11::module_& module);
void bind_kl_balance(pybind11::module_& module);     // and kl_balance_normal
void bind_knn_bonus(pybind11::module_& module);
void bind_lambda_return(pybind11::module_& module);
void bind_parts(pybind11::module_& module);
void bind_rssm_imagine(pybind11::module_& module);   // and rssm_rollout
void bind_rssm_observe(pybind11::module_& module);   // and stacked_observe
void bind_rssm_step(pybind11::module_& module);      // and policy

}  // namespace apv_fast
