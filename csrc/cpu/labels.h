// Reads labels of any type. Included inside an unnamed namespace, by the host code (which checks them) and by every
// kernels_<isa>.cpp (which decodes a tile of them). No standard library templates, see vector.h.
#pragma once

// Label bits as stored; the floating-point ones of 16 bits come as their bits.
struct HalfBitsLabel {
  uint16_t bits;
};
struct BrainBitsLabel {
  uint16_t bits;
};
inline double label_value(HalfBitsLabel v) {
  const uint64_t sign = static_cast<uint64_t>(v.bits >> 15) << 63, exponent = (v.bits >> 10) & 31,
                 mantissa = v.bits & 1023;
  uint64_t bits;
  if (exponent == 31) {
    bits = sign | 0x7ff0000000000000u | (mantissa << 42);
  } else if (exponent == 0) {
    const double value = static_cast<double>(mantissa) * 0x1p-24;
    return sign ? -value : value;
  } else {
    bits = sign | ((exponent + 1008) << 52) | (mantissa << 42);
  }
  double value;
  __builtin_memcpy(&value, &bits, 8);
  return value;
}
inline double label_value(BrainBitsLabel v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return static_cast<double>(value);
}
inline float label_value(float v) { return v; }
inline double label_value(double v) { return v; }
inline int64_t label_value(int64_t v) { return v; }
inline int32_t label_value(int32_t v) { return v; }
inline int32_t label_value(int16_t v) { return v; }
inline int32_t label_value(int8_t v) { return v; }
inline int32_t label_value(uint8_t v) { return v; }
inline int32_t label_value(bool v) { return v; }

// Calls f with a pointer of the labels' type.
template <class F>
static auto with_label_type(const Labels& labels, F f) {
  switch (labels.type) {
    case LabelType::kFloat32:
      return f(static_cast<const float*>(labels.data));
    case LabelType::kFloat64:
      return f(static_cast<const double*>(labels.data));
    case LabelType::kBFloat16:
      return f(static_cast<const BrainBitsLabel*>(labels.data));
    case LabelType::kFloat16:
      return f(static_cast<const HalfBitsLabel*>(labels.data));
    case LabelType::kInt32:
      return f(static_cast<const int32_t*>(labels.data));
    case LabelType::kInt16:
      return f(static_cast<const int16_t*>(labels.data));
    case LabelType::kInt8:
      return f(static_cast<const int8_t*>(labels.data));
    case LabelType::kUInt8:
      return f(static_cast<const uint8_t*>(labels.data));
    case LabelType::kBool:
      return f(static_cast<const bool*>(labels.data));
    default:
      return f(static_cast<const int64_t*>(labels.data));
  }
}

// Labels as numbers, transposed: out[t * out_stride + r] for `columns` label columns that lie `step` elements apart.
// Row by row, so that a row of a matrix of labels is read as it lies.
template <class T, class L>
static void gather_labels(const L* labels, int64_t row_stride, int64_t step, int64_t columns, int64_t rows, T* out,
                          int64_t out_stride) {
  if (columns == 1) {
    for (int64_t r = 0; r < rows; ++r) out[r] = static_cast<T>(label_value(labels[r * row_stride]));
    return;
  }
  if (columns == 8) {
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int64_t t = 0; t < 8; ++t)
        out[t * out_stride + r] = static_cast<T>(label_value(labels[r * row_stride + t * step]));
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < columns; ++t)
      out[t * out_stride + r] = static_cast<T>(label_value(labels[r * row_stride + t * step]));
}
