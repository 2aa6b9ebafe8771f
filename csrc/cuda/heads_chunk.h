// Heads with hidden layers: what is launched for a chunk of rows.
#pragma once

#include "heads_run.h"

namespace mtl::cuda {
namespace {

template <class Engine>
void HeadsRun<Engine>::forward() {
  // Gradients from outside need no outputs.
  for (int64_t layer = 0; layer < depth - (call.grads ? 1 : 0); ++layer) {
    const bool together = joint(layer), last = layers.last(layer);
    const auto run = [&](auto engine, auto large, auto a) {
      using A = std::remove_const_t<std::remove_pointer_t<decltype(a.data)>>;
      RowsJob<A, Element, Sum> job{};
      job.chunk = chunk;
      job.a = a;
      job.of_x = layer == 0;
      job.weight = view<Element>(layers.weights[layer]);
      if (!layers.biases.empty()) {
        job.bias = static_cast<const Element*>(layers.biases[layer].const_data_ptr());
        job.bias_stride = layers.biases[layer].stride(0);
      }
      job.layer = place(layer, together);
      job.inputs = layers.inputs[layer];
      job.input_step = layer == 0 ? 0 : layers.inputs[layer];
      if (!last) {
        job.finish = Finish::kActivate;
        job.to = h[layer];
        job.slope = slope[layer];
        job.to_row = columns(layer);
        job.units = layers.hidden;
        job.units.layer = layer;
        job.units.of_task = layers.units(layer);
      } else if (wanted.out) {
        job.finish = Finish::kNarrow;
        job.out = static_cast<Element*>(wanted.out);
        job.out_row = wanted.out_columns;
      } else {
        job.finish = Finish::kKeep;
        job.to = z;
        job.to_row = columns(layer);
      }
      check(multiply_rows<decltype(engine), false, decltype(large)::value>(job, batch(together),
                                                                           widest(layer, together), stream));
    };
    if (layer == 0)
      run(Engine{}, std::true_type{}, view<Element>(call.x));
    else
      run(WideEngine<Element, Sum>{}, std::false_type{}, scratch_view(h[layer - 1], columns(layer - 1)));
  }
}

template <class Engine>
void HeadsRun<Engine>::gradients_from_outside() {
  check(launch(outside_kernel<Sum>, dim3(blocks_for(chunk.count, routed ? 1 : kThreads), across(sources)),
               dim3(kThreads), 0, stream, chunk, static_cast<const DeviceTask*>(tasks), sources, z,
               columns(depth - 1)));
}

template <class Engine>
void HeadsRun<Engine>::chunk_losses(int64_t first) {
  const int64_t block = routed ? first : first / loss_rows();
  double* const own = loss_parts + block * (routed ? 1 : count);
  const HeadsLossJob<Sum> job{chunk, tasks, reals, labels, scale, count, n, z, columns(depth - 1), own, gradient};
  check(launch(heads_loss_kernel<Sum>, dim3(blocks_for(chunk.count, routed ? 1 : kThreads), routed ? 1 : across(count)),
               dim3(kThreads), 0, stream, job));
}

template <class Engine>
void HeadsRun<Engine>::backward(int64_t first) {
  for (int64_t layer = depth - 1; layer >= 0; --layer) {
    const View<Sum> g = scratch_view(layers.last(layer) ? z : slope[layer], columns(layer));
    if (parameters) layer_sums(layer, g, first);
    if (layer == 0 && !needs_dx) return;
    const bool together = joint(layer) && !gramian;
    RowsJob<Sum, Element, Sum> job{};
    job.chunk = chunk;
    job.a = g;
    job.weight = view<Element>(layers.weights[layer]);
    job.layer = place(layer, together);
    job.inputs = layers.inputs[layer];
    job.input_step = layers.inputs[layer];
    if (layer > 0) {
      job.finish = Finish::kMultiply;
      job.to = slope[layer - 1];
      job.to_row = columns(layer - 1);
    } else if (gramian) {  // unrouted: [tasks, rows, D]
      job.finish = Finish::kKeep;
      job.to = jacobian;
      job.to_row = d;
      job.input_step = chunk.count * d;
    } else {
      job.finish = Finish::kNarrow;
      job.out = static_cast<Element*>(wanted.dx);
      job.out_row = d;
    }
    check(multiply_rows<WideEngine<Element, Sum>, true, true>(job, batch(together), job.inputs, stream));
  }
  if (gramian) add_gramian(first);
}

// The gradients of a layer's parameters.
template <class Engine>
void HeadsRun<Engine>::layer_sums(int64_t layer, const View<Sum>& g, int64_t first) {
  const bool together = joint(layer);
  const int64_t inputs = layers.inputs[layer], rows = layers.rows[layer];
  const int64_t items = routed ? chunk.count : row_slices(chunk.count, rows, inputs);
  const auto run = [&](auto large, auto b) {
    using B = std::remove_const_t<std::remove_pointer_t<decltype(b.data)>>;
    const int64_t size = routed ? columns(layer) * inputs : rows * inputs;
    if (size == 0) return;
    OuterJob<B, Sum> job{};
    job.chunk = chunk;
    job.g = g;
    job.b = b;
    job.of_x = layer == 0;
    job.layer = place(layer, together);
    job.inputs = inputs;
    job.input_step = layer == 0 ? 0 : inputs;
    job.items = items;
    job.parts = parts;
    job.part_size = size;
    check(outer_products<decltype(large)::value>(job, batch(together), widest(layer, together), stream));
    add_up(items, size, layer, together, inputs, rows * inputs, sums + layers.weight_place[layer], first);
  };
  if (layer == 0)
    run(std::true_type{}, view<Element>(call.x));
  else
    run(std::false_type{}, scratch_view(h[layer - 1], columns(layer - 1)));
  if (layers.biases.empty()) return;
  OuterJob<Sum, Sum> job{};
  job.chunk = chunk;
  job.g = g;
  job.layer = place(layer, together);
  job.items = items;
  job.parts = parts;
  job.part_size = routed ? columns(layer) : rows;
  check(bias_sums(job, batch(together), widest(layer, together), stream));
  add_up(items, job.part_size, layer, together, 1, rows, sums + layers.bias_place[layer], first);
}

// Adds the parts of a chunk to the sums of a layer, which has `size` numbers.
template <class Engine>
void HeadsRun<Engine>::add_up(int64_t items, int64_t part_size, int64_t layer, bool together, int64_t inputs,
                              int64_t size, Sum* to, int64_t first) {
  if (!routed) {
    check(launch(add_parts_kernel<Sum>, dim3(blocks_for(size, kThreads)), dim3(kThreads), 0, stream,
                 static_cast<const Sum*>(parts), items, size, to));
    return;
  }
  const int64_t across_elements = std::min<int64_t>((part_size + kThreads - 1) / kThreads, 1024);
  check(launch(add_pieces_kernel<Sum>, dim3(static_cast<unsigned>(across_elements), across(count)), dim3(kThreads), 0,
               stream, static_cast<const Sum*>(parts), part_size, static_cast<const int64_t*>(route.piece_begin), count,
               first, first + chunk.count, place(layer, together), inputs, to));
}

template <class Engine>
void HeadsRun<Engine>::add_gramian(int64_t first) {
  if (routed) {
    check(launch(squares_kernel<Sum>, dim3(static_cast<unsigned>(chunk.count)), dim3(kThreads), 0, stream, chunk,
                 static_cast<const Sum*>(jacobian), d, square_parts + first));
    return;
  }
  // Slices of about 1024 numbers, added in float64: their number is that of what may cancel.
  const int64_t numbers = chunk.count * d, pairs = count * count;
  const int64_t most = std::max<int64_t>(1, numbers_of_chunk / 4 / pairs);
  const int64_t slices = std::clamp<int64_t>(numbers / 1024, 1, std::min<int64_t>(most, 65535));
  const View<Sum> j = view_of<Sum>(jacobian, count, numbers, numbers, 1);
  check(gemm<Exact<Sum>, Sum, false, false>({j, j, nullptr, 0, parts, count, count, numbers}, slices, stream));
  check(launch(add_wide_kernel<Sum>, dim3(blocks_for(pairs, kThreads)), dim3(kThreads), 0, stream,
               static_cast<const Sum*>(parts), slices, pairs, products));
}

}  // namespace
}  // namespace mtl::cuda
