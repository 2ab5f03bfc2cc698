// The Python module fastast._packing: NumPy arrays in and out of strategies.h and lookahead.h.

#include "lookahead.h"
#include "strategies.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;
namespace packing = fastast::packing;

namespace {

// Without forcecast NumPy converts only what loses nothing: int32 is taken, float64 is refused.
using Int64Array = py::array_t<std::int64_t, py::array::c_style>;

// Calls fill(lengths, count, bin_of) without the interpreter's lock and returns bin_of.
template <class Fill>
Int64Array bins_of(const Int64Array& lengths, const Fill& fill) {
  if (lengths.ndim() != 1) {
    throw py::value_error("lengths has " + std::to_string(lengths.ndim()) +
                          " dimensions; it must have one");
  }
  Int64Array bins(lengths.size());
  const std::int64_t* in = lengths.data();
  std::int64_t* out = bins.mutable_data();
  const auto count = static_cast<std::size_t>(lengths.size());
  {
    py::gil_scoped_release release;
    fill(in, count, out);
  }
  return bins;
}

const packing::Strategy& find(const std::string& name) {
  std::string known;
  for (const packing::Strategy& strategy : packing::strategies) {
    if (name == strategy.name) return strategy;
    known += (known.empty() ? "" : ", ") + std::string(strategy.name);
  }
  throw py::value_error("strategy is '" + name + "'; it must be one of " + known);
}

Int64Array pack_all(const Int64Array& lengths, std::int64_t max_tokens, std::int64_t max_items,
                    const std::string& strategy) {
  const packing::Place place = find(strategy).place;
  const packing::Limits limits{max_tokens, max_items};
  return bins_of(lengths, [&](const std::int64_t* in, std::size_t count, std::int64_t* out) {
    packing::check(in, count, limits);
    std::vector<packing::Bin> bins;
    place(in, 0, count, limits, bins);
    for (std::size_t bin = 0; bin < bins.size(); ++bin) {
      for (const std::size_t clip : bins[bin].clips) out[clip] = static_cast<std::int64_t>(bin);
    }
  });
}

Int64Array pack(const Int64Array& lengths, std::int64_t max_tokens, std::int64_t max_items,
                const std::string& strategy, std::int64_t window, std::int64_t group) {
  const packing::Strategy& found = find(strategy);
  return bins_of(lengths, [&](const std::int64_t* in, std::size_t count, std::int64_t* out) {
    packing::pack(in, count, packing::Limits{max_tokens, max_items}, found, window, group, out);
  });
}

}  // namespace

PYBIND11_MODULE(_packing, m) {
  m.doc() = "Packing clips into bins of limited size (see csrc/packing).";

  py::list names;
  for (const packing::Strategy& strategy : packing::strategies) names.append(strategy.name);
  m.attr("STRATEGIES") = py::tuple(names);

  m.def("pack_all", &pack_all, py::arg("lengths"), py::arg("max_tokens"), py::arg("max_items"),
        py::arg("strategy"),
        R"(Bin of every clip, all packed at once, in the order in which bins are opened.

Args:
    lengths: int64 [clips], tokens of each clip; zero is legal.
    max_tokens: most tokens in a bin, at least 0.
    max_items: most clips in a bin, at least 1.
    strategy: one of STRATEGIES.

Returns:
    int64 [clips], counting up from 0.

Raises:
    ValueError: a length is negative or exceeds max_tokens (the message names the clip), a limit
        is out of range, strategy is unknown, or lengths is not one-dimensional.)");

  m.def("pack", &pack, py::arg("lengths"), py::arg("max_tokens"), py::arg("max_items"),
        py::arg("strategy"), py::arg("window"), py::arg("group"),
        R"(Bin of every clip of a stream, packed window by window, for `group` ranks.

Args, errors: as pack_all, and
    window: clips that are looked at together, at least 1.
    group: bins of an optimiser step, at least 1.

Returns:
    int64 [clips]; step s owns the bins s * group to s * group + group - 1.)");
}
