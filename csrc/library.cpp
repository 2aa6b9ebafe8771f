// Every op of the library: schemas, and what is no computation. Implementations register themselves per device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "common/precision.h"
#include "cpu/isa.h"

namespace {

// The devices there are kernels for; an op need not have them for all.
std::string devices() {
#ifdef MTL_WITH_CUDA
  return "cpu,cuda";
#else
  return "cpu";
#endif
}

void allow_tf32(bool allowed) { mtl::tf32_allowed = allowed; }

}  // namespace

STABLE_TORCH_LIBRARY(torch_mtl_pyg, m) {
  m.def("multi_head_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "multi_head_linear_backward(Tensor[] grads, Tensor x, Tensor weight, bool need_x, bool need_weight, bool "
      "need_bias)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("grouped_linear(Tensor[] xs, Tensor[] weights, Tensor? bias) -> Tensor");
  m.def(
      "grouped_linear_backward(Tensor grad, Tensor[] xs, Tensor[] weights, bool[] need_xs, bool[] need_weights, bool "
      "need_bias)"
      " -> (Tensor[], Tensor[], Tensor)");
  m.def(
      "multi_head_loss(Tensor x, Tensor weight, Tensor? bias, Tensor[] targets, Tensor integers, Tensor reals, Tensor "
      "task_weight, bool need_x, bool need_weight, bool need_bias, bool need_gramian)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "multi_head_mlp(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? route, Tensor integers, Tensor? seed, int "
      "act, "
      "float dropout, SymInt columns) -> Tensor");
  m.def(
      "multi_head_mlp_backward(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] biases, Tensor? route, Tensor "
      "integers, Tensor? seed, int act, float dropout, bool need_x, bool need_parameters) -> (Tensor, Tensor)");
  m.def(
      "multi_head_mlp_loss(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? route, Tensor integers, Tensor? seed, "
      "int "
      "act, float dropout, Tensor[] targets, Tensor reals, Tensor task_weight, bool need_x, bool need_parameters, bool "
      "need_gramian) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "group_edges(Tensor key, Tensor other, SymInt num_keys, SymInt num_others)"
      " -> (Tensor ptr, Tensor index, Tensor perm)");

  m.def(
      "aggregate(Tensor x, Tensor ptr, Tensor index, Tensor? place, Tensor? edge_weight, Tensor? factors, int reduce)"
      " -> Tensor");
  m.def(
      "aggregate_extreme_backward(Tensor grad, Tensor x, Tensor result, Tensor ptr, Tensor index, Tensor source_ptr, "
      "Tensor source_index) -> Tensor");
  m.def("edge_dots(Tensor a, Tensor x, Tensor ptr, Tensor index, Tensor? place, int reduce) -> Tensor");
  m.def(
      "aggregate_linear(Tensor x, Tensor ptr, Tensor index, Tensor? place, Tensor? edge_weight, Tensor[] weights, "
      "Tensor? root, Tensor[] root_weights, Tensor? bias, int reduce, bool project_first, bool keep)"
      " -> (Tensor, Tensor)");
  m.def(
      "aggregate_linear_backward(Tensor grad, Tensor x, Tensor source_ptr, Tensor source_index, Tensor? source_place, "
      "Tensor? edge_weight, Tensor? factors, Tensor[] weights, Tensor[] root_weights, bool need_x, bool need_weight)"
      " -> (Tensor, Tensor)");

  m.def("scale_gradients(Tensor(a!)[] grads, Tensor factor) -> ()");

  m.def("copy_rate(Tensor like, float seconds) -> float");
  m.def("multiply_add_rate(Tensor like, float seconds) -> float");
  m.def("allow_tf32(bool allowed) -> ()");
  m.def("devices() -> str");
  m.def("isa() -> str");
  m.def("isas_available() -> str");
  m.def("set_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CompositeExplicitAutograd, m) {
  m.impl("allow_tf32", TORCH_BOX(&allow_tf32));
  m.impl("devices", TORCH_BOX(&devices));
  m.impl("isa", TORCH_BOX(&mtl::isa));
  m.impl("isas_available", TORCH_BOX(&mtl::isas_available));
  m.impl("set_isa", TORCH_BOX(&mtl::set_isa));
}
