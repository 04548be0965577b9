// The entry points of the linear layer: which kernel takes a call.
#pragma once

#include "linear_backward.h"
#include "linear_forward.h"
#include "linear_split.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
int linear_forward(const fastseq_linear_forward* call) {
  ProfiledCall profiled;
  if (profiled.begins<T>("linear_forward", activation_name(call->shape.activation))) {
    profile_sizes(call->shape);
    profile_size("residual", call->residual.data != nullptr);
    profile_size("saves", call->pre_activation != nullptr);
  }
#if FS_MATRIX_UNIT
  if constexpr (has_split_products<T>)
    if (linear_is_split(call->shape)) return SplitLinearForward(*call).run();
#endif
  return LinearForward<T>(*call).run();
}

template <class T>
int linear_backward(const fastseq_linear_backward* call) {
  ProfiledCall profiled;
  if (profiled.begins<T>("linear_backward", activation_name(call->shape.activation))) {
    profile_sizes(call->shape);
    profile_size("needs_input", call->grad_x.data != nullptr);
    profile_size("needs_weight", call->grad_weight != nullptr);
    profile_size("needs_bias", call->grad_bias != nullptr);
  }
#if FS_MATRIX_UNIT
  if constexpr (has_split_products<T>)
    if (linear_is_split(call->shape)) return SplitLinearBackward(*call).run();
#endif
  return LinearBackward<T>(*call).run();
}

}  // namespace
}  // namespace fastseq::FS_ISA
