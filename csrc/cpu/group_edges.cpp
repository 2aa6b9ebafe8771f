// group_edges on the CPU: the edges of a graph in the order of a key, one of their two ends.
//
//   perm  [E]             positions of the edges, sorted by key; the edges of one key keep their order
//   index [E]             other[perm]
//   ptr   [num_keys + 1]  the edges of key k are those from ptr[k] to ptr[k + 1]
//
// A counting sort. Where its counters or its writes would not stay in the cache, edges are first split into buckets of
// neighbouring keys. The result is unique, hence the same however the work is shared out.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "../common/checks.h"
#include "buffer.h"
#include "host.h"

namespace mtl {
namespace {

using torch::stable::parallel_for;

// Keys that are grouped at once, whatever the number of edges: as many streams are written to.
constexpr int64_t kKeys = 1 << 10;
// So few edges that all stays in the cache, with so many counters.
constexpr int64_t kFewEdges = 1 << 14, kFewEdgesKeys = 1 << 14;
// Edges and keys of a bucket, whose records and counters stay in the first-level cache; and the most buckets, since
// each is a stream with a page of its own.
constexpr int64_t kBucketEdges = 1 << 12, kBucketKeys = 1 << 12, kBuckets = 1 << 10;
// Edges that pay for waking a thread.
constexpr int64_t kThreadEdges = 1 << 14;

int bits(uint64_t value) {
  int n = 0;
  for (; value != 0; value >>= 1) ++n;
  return n;
}

template <class T>
Buffer make_array(int64_t count) {
  return make_buffer(count * static_cast<int64_t>(sizeof(T)));
}

// Contiguous shares of n items.
struct Chunks {
  int64_t n, count;
  int64_t edge(int64_t chunk) const { return n / count * chunk + std::min(chunk, n % count); }
};

Chunks chunks_of(int64_t n) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return {n, std::clamp<int64_t>(n / kThreadEdges, 1, std::max<int64_t>(1, threads))};
}

// f(chunk) for all chunks.
template <class F>
void for_each(int64_t chunks, const F& f) {
  if (chunks == 1) return f(int64_t{0});
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
  });
}

// Turns counters of chunks and items, [chunks][items], into the places where each chunk puts its first one of an item.
// Calls f(item, place) with the place after the last one.
template <class F>
void counts_to_places(int64_t* counters, int64_t chunks, int64_t row, int64_t items, int64_t place, const F& f) {
  for (int64_t item = 0; item < items; ++item) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int64_t& counter = counters[chunk * row + item];
      const int64_t n = counter;
      counter = place;
      place += n;
    }
    f(item, place);
  }
}

// ---- Edges as the counting sort reads and puts them. Loops take them by value: of a reference, the compiler would
// read each member again after every store.

struct Result {
  int64_t *ptr, *index, *perm;
};

// One end of all edges. Negative numbers become huge ones, so that one comparison checks a range.
template <class T>
struct Ends {
  const T* data;
  int64_t stride;
  uint64_t operator[](int64_t edge) const { return static_cast<uint64_t>(static_cast<int64_t>(data[edge * stride])); }
};

// The tensors themselves. A key out of range is counted after the last key.
template <class T>
struct Edges {
  Ends<T> key, other;
  uint64_t num_keys, num_others;
  int64_t *index, *perm;

  int64_t key_of(int64_t e) const { return static_cast<int64_t>(std::min(key[e], num_keys)); }
  // Returns whether the other end is in range.
  bool put(int64_t e, int64_t place) const {
    const uint64_t value = other[e];
    index[place] = static_cast<int64_t>(value);
    perm[place] = e;
    return value < num_others;
  }
};

// An edge in one word, from the highest bits down: key within its bucket (its other bits are shifted out), other end,
// position.
struct Narrow {
  using Record = uint64_t;
  int key_shift, other_bits, position_bits;

  Record pack(uint64_t key, uint64_t other, int64_t position) const {
    return key << key_shift | other << position_bits | static_cast<uint64_t>(position);
  }
  int64_t key(Record r) const { return static_cast<int64_t>(r >> key_shift); }
  int64_t other(Record r) const { return static_cast<int64_t>(r >> position_bits & ((uint64_t{1} << other_bits) - 1)); }
  int64_t position(Record r) const { return static_cast<int64_t>(r & ((uint64_t{1} << position_bits) - 1)); }
};

// The same in two, where one is too short.
struct Wide {
  struct Record {
    uint64_t key_position, other;
  };
  int key_shift;

  Record pack(uint64_t key, uint64_t other, int64_t position) const {
    return {key << key_shift | static_cast<uint64_t>(position), other};
  }
  int64_t key(Record r) const { return static_cast<int64_t>(r.key_position >> key_shift); }
  int64_t other(Record r) const { return static_cast<int64_t>(r.other); }
  int64_t position(Record r) const { return static_cast<int64_t>(r.key_position & ((uint64_t{1} << key_shift) - 1)); }
};

// All edges, put as records into buckets of 2^shift keys.
template <class T, class Format>
struct Split {
  Edges<T> edges;
  int shift;
  int64_t buckets;
  Format format;
  typename Format::Record* records;

  int64_t key_of(int64_t e) const {
    const uint64_t key = edges.key[e];
    return key < edges.num_keys ? static_cast<int64_t>(key >> shift) : buckets;
  }
  bool put(int64_t e, int64_t place) const {
    const uint64_t other = edges.other[e];
    records[place] = format.pack(edges.key[e], other, e);
    return other < edges.num_others;
  }
};

// A bucket is sorted into scratch memory: its records may lie where the result will.
template <class Format>
struct Bucket {
  Format format;
  const typename Format::Record* records;
  typename Format::Record* sorted;

  int64_t key_of(int64_t e) const { return format.key(records[e]); }
  bool put(int64_t e, int64_t place) const {
    sorted[place] = records[e];
    return true;
  }
};

template <class Format>
void unpack(Format format, const typename Format::Record* sorted, int64_t begin, int64_t end, int64_t* index,
            int64_t* perm) {
  for (int64_t e = begin; e < end; ++e) {
    index[e] = format.other(sorted[e]);
    perm[e] = format.position(sorted[e]);
  }
}

// Puts each edge where its key has its place. In two steps: a store to a place just read from memory would hold up the
// reading of the next one, until the processor knows that they differ.
template <class E>
bool put_all(E edges, int64_t begin, int64_t end, int64_t* next) {
  constexpr int64_t kBlock = 64;
  int64_t places[kBlock];
  bool good = true;
  for (int64_t e = begin; e < end; e += kBlock) {
    const int64_t n = std::min(kBlock, end - e);
    for (int64_t i = 0; i < n; ++i) places[i] = next[edges.key_of(e + i)]++;
    for (int64_t i = 0; i < n; ++i) good &= edges.put(e + i, places[i]);
  }
  return good;
}

// ---- The counting sort of edges of few keys. ends[k] becomes first + the end of key k.

// By one thread. The counters lie in `ends`; each walks from the first edge of its key to the end of the last.
template <class E>
void sort_serially(E edges, int64_t count, int64_t keys, int64_t first, int64_t* ends) {
  std::memset(ends, 0, keys * sizeof(int64_t));
  for (int64_t e = 0; e < count; ++e) ++ends[edges.key_of(e)];
  counts_to_places(ends, 1, keys, keys, 0, [](int64_t, int64_t) {});
  // In one step: here counters are many, and seldom the one just written.
  for (int64_t e = 0; e < count; ++e) edges.put(e, ends[edges.key_of(e)]++);
  for (int64_t k = 0; k < keys; ++k) ends[k] += first;
}

// By all threads, with counters for each share of the edges. Returns whether all edges are in range.
template <class E>
bool sort_together(const E& edges, int64_t count, int64_t keys, int64_t first, int64_t* ends) {
  const Chunks chunks = chunks_of(count);
  const int64_t row = keys + 1;
  const Buffer buffer = make_array<int64_t>(chunks.count * row);
  int64_t* const counters = static_cast<int64_t*>(buffer.get());
  std::atomic<bool> good{true};
  for_each(chunks.count, [&](int64_t chunk) {
    const E mine = edges;
    int64_t* const counts = counters + chunk * row;
    std::memset(counts, 0, row * sizeof(int64_t));
    for (int64_t e = chunks.edge(chunk), end = chunks.edge(chunk + 1); e < end; ++e) ++counts[mine.key_of(e)];
    if (counts[keys] != 0) good = false;
  });
  if (!good) return false;
  counts_to_places(counters, chunks.count, row, keys, 0, [&](int64_t k, int64_t end) { ends[k] = first + end; });
  for_each(chunks.count, [&](int64_t chunk) {
    if (!put_all(edges, chunks.edge(chunk), chunks.edge(chunk + 1), counters + chunk * row)) good = false;
  });
  return good;
}

// ---- The split into buckets of 2^shift neighbouring keys, and the sort of each.

template <class T, class Format>
bool split_and_sort(const Edges<T>& edges, int64_t count, int shift, const Format& format, int64_t* ends) {
  using Record = typename Format::Record;
  const int64_t num_keys = static_cast<int64_t>(edges.num_keys);
  const int64_t buckets = ((num_keys - 1) >> shift) + 1;
  const Buffer starts_buffer = make_array<int64_t>(buckets + 1);
  int64_t* const starts = static_cast<int64_t*>(starts_buffer.get());
  // Records of one word lie in perm.
  constexpr bool kInPlace = std::is_same_v<Format, Narrow>;
  const Buffer records_buffer = make_array<Record>(kInPlace ? 0 : count);
  Record* const records = kInPlace ? reinterpret_cast<Record*>(edges.perm) : static_cast<Record*>(records_buffer.get());
  starts[0] = 0;
  if (!sort_together(Split<T, Format>{edges, shift, buckets, format, records}, count, buckets, 0, starts + 1))
    return false;

  const int64_t workers = chunks_of(count + num_keys).count;
  // Larger ones would keep one thread busy while the others wait.
  const int64_t most = workers == 1 ? count : std::max(4 * kThreadEdges, count / (4 * workers));
  int64_t most_alone = 0, most_together = 0;
  for (int64_t b = 0; b < buckets; ++b) {
    const int64_t n = starts[b + 1] - starts[b];
    int64_t& largest = n > most ? most_together : most_alone;
    largest = std::max(largest, n);
  }
  const auto keys_of = [&](int64_t b) { return std::min(num_keys, (b + 1) << shift) - (b << shift); };
  if (most_together > 0) {
    const Buffer scratch = make_array<Record>(most_together);
    Record* const sorted = static_cast<Record*>(scratch.get());
    for (int64_t b = 0; b < buckets; ++b) {
      const int64_t first = starts[b], n = starts[b + 1] - first;
      if (n <= most) continue;
      sort_together(Bucket<Format>{format, records + first, sorted}, n, keys_of(b), first, ends + (b << shift));
      const Chunks parts = chunks_of(n);
      for_each(parts.count, [&](int64_t part) {
        unpack(format, sorted, parts.edge(part), parts.edge(part + 1), edges.index + first, edges.perm + first);
      });
    }
  }
  const Buffer scratch = make_array<Record>(workers * most_alone);
  std::atomic<int64_t> next{0};
  for_each(workers, [&](int64_t worker) {
    Record* const sorted = static_cast<Record*>(scratch.get()) + worker * most_alone;
    for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < buckets;) {
      const int64_t first = starts[b], n = starts[b + 1] - first;
      if (n > most) continue;
      sort_serially(Bucket<Format>{format, records + first, sorted}, n, keys_of(b), first, ends + (b << shift));
      unpack(format, sorted, 0, n, edges.index + first, edges.perm + first);
    }
  });
  return true;
}

template <class T>
bool sort_edges(const Edges<T>& edges, int64_t count, int64_t* ends) {
  const int64_t num_keys = static_cast<int64_t>(edges.num_keys);
  if (num_keys <= kKeys || (count <= kFewEdges && num_keys <= kFewEdgesKeys))
    return sort_together(edges, count, num_keys, 0, ends);
  const int64_t wanted = std::clamp<int64_t>(std::max(count / kBucketEdges, num_keys / kBucketKeys), 2, kBuckets);
  // At least one bit of the key, since a shift by 64 is undefined; at most so many that counters fit the cache.
  const int shift = std::clamp(bits((num_keys - 1) / wanted), 1, 20);
  const int other_bits = bits(edges.num_others - 1), position_bits = bits(count - 1);
  if (shift + other_bits + position_bits <= 64)
    return split_and_sort(edges, count, shift, Narrow{64 - shift, other_bits, position_bits}, ends);
  return split_and_sort(edges, count, shift, Wide{64 - shift}, ends);
}

// ---- Edges that come in order.

template <class T>
bool is_sorted(const Ends<T>& key, int64_t count) {
  constexpr int64_t kBlock = 512;
  const auto block_is_sorted = [key, count](int64_t begin) {
    bool sorted = true;
    for (int64_t e = begin, end = std::min(begin + kBlock, count - 1); e < end; ++e)
      sorted &= key.data[e * key.stride] <= key.data[(e + 1) * key.stride];
    return sorted;
  };
  if (!block_is_sorted(0)) return false;
  std::atomic<bool> sorted{true};
  const Chunks chunks = chunks_of(count);
  for_each(chunks.count, [&](int64_t chunk) {
    for (int64_t e = chunks.edge(chunk), end = chunks.edge(chunk + 1); e < end; e += kBlock) {
      if (!sorted.load(std::memory_order_relaxed)) return;
      if (!block_is_sorted(e)) sorted = false;
    }
  });
  return sorted;
}

template <class T>
bool copy_sorted(const Edges<T>& edges, int64_t count, int64_t* ends) {
  // Negative ones are huge: looking at both suffices.
  if (edges.key[0] >= edges.num_keys || edges.key[count - 1] >= edges.num_keys) return false;
  std::atomic<bool> good{true};
  const Chunks chunks = chunks_of(count);
  for_each(chunks.count, [&](int64_t chunk) {
    const Edges<T> mine = edges;
    const int64_t begin = chunks.edge(chunk), end = chunks.edge(chunk + 1);
    bool in_range = true;
    int64_t k = begin == 0 ? 0 : static_cast<int64_t>(mine.key[begin - 1]);
    for (int64_t e = begin; e < end; ++e) {
      for (const int64_t now = static_cast<int64_t>(mine.key[e]); k < now; ++k) ends[k] = e;
      in_range &= mine.put(e, e);
    }
    if (!in_range) good = false;
  });
  std::fill(ends + edges.key[count - 1], ends + edges.num_keys, count);
  return good;
}

// Finds the first edge that is out of range, and says so.
template <class T>
[[noreturn]] void refuse(const Edges<T>& edges, int64_t count) {
  const auto check = [](uint64_t value, uint64_t size, const char* name, int64_t e) {
    if (value < size) return;
    std::ostringstream message;  // without the place in this source, which says nothing to a user
    message << "edge_index: expected " << name << " in [0, " << size << "), got " << static_cast<int64_t>(value)
            << " at edge " << e;
    throw std::runtime_error(message.str());
  };
  for (int64_t e = 0; e < count; ++e) {
    check(edges.key[e], edges.num_keys, "key", e);
    check(edges.other[e], edges.num_others, "other", e);
  }
  throw std::runtime_error("edge_index: expected values that nobody changes meanwhile");
}

template <class T>
void group(const Tensor& key, const Tensor& other, int64_t num_keys, int64_t num_others, const Result& out) {
  const int64_t count = key.size(0);
  const Edges<T> edges{{static_cast<const T*>(key.const_data_ptr()), key.stride(0)},
                       {static_cast<const T*>(other.const_data_ptr()), other.stride(0)},
                       static_cast<uint64_t>(num_keys),
                       static_cast<uint64_t>(num_others),
                       out.index,
                       out.perm};
  out.ptr[0] = 0;
  int64_t* const ends = out.ptr + 1;
  if (count == 0) {
    std::fill(ends, ends + num_keys, 0);
    return;
  }
  const bool good = num_keys > 0 && num_others > 0 &&
                    (is_sorted(edges.key, count) ? copy_sorted(edges, count, ends) : sort_edges(edges, count, ends));
  if (!good) refuse(edges, count);
}

std::tuple<Tensor, Tensor, Tensor> group_edges(const Tensor& key, const Tensor& other, int64_t num_keys,
                                               int64_t num_others) {
  const ScalarType type = key.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int, "key: expected int64 or int32");
  STD_TORCH_CHECK(other.scalar_type() == type, "other: expected the dtype of key, got another");
  STD_TORCH_CHECK(key.is_cpu() && key.dim() == 1, "key: expected a CPU vector");
  STD_TORCH_CHECK(other.is_cpu() && other.dim() == 1, "other: expected a CPU vector");
  check_size(other.size(0), key.size(0), "other: size of dimension 0");
  STD_TORCH_CHECK(num_keys >= 0 && num_keys < std::numeric_limits<int64_t>::max() / 16,
                  "num_keys: expected a size of at least 0, got ", num_keys);
  STD_TORCH_CHECK(num_others >= 0, "num_others: expected a size of at least 0, got ", num_others);
  Tensor ptr = empty({num_keys + 1}, ScalarType::Long);
  Tensor index = empty({key.size(0)}, ScalarType::Long), perm = empty({key.size(0)}, ScalarType::Long);
  const Result out{static_cast<int64_t*>(ptr.mutable_data_ptr()), static_cast<int64_t*>(index.mutable_data_ptr()),
                   static_cast<int64_t*>(perm.mutable_data_ptr())};
  if (type == ScalarType::Long)
    group<int64_t>(key, other, num_keys, num_others, out);
  else
    group<int32_t>(key, other, num_keys, num_others, out);
  return {ptr, index, perm};
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CPU, m) { m.impl("group_edges", TORCH_BOX(&mtl::group_edges)); }
