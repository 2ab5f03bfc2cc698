// The Python module fastast._packing: NumPy arrays in and out of the strategies in packing.h.

#include "packing.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;
namespace packing = fastast::packing;

namespace {

// Without forcecast NumPy converts only what loses nothing: int32 is taken, float64 is refused.
using Int64Array = py::array_t<std::int64_t, py::array::c_style>;

template <auto strategy>
Int64Array pack(const Int64Array& lengths, std::int64_t max_tokens, std::int64_t max_items) {
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
    strategy(in, count, packing::Limits{max_tokens, max_items}, out);
  }
  return bins;
}

}  // namespace

PYBIND11_MODULE(_packing, m) {
  m.doc() = "Packing clips into bins of limited size (see csrc/packing/packing.h).";

  m.def("next_fit", &pack<packing::next_fit>, py::arg("lengths"), py::arg("max_tokens"),
        py::arg("max_items"),
        R"(Bin number of every item, filling one bin at a time in the given order.

The item that would take its bin beyond max_tokens or max_items opens the next bin; closed bins
are not revisited. This is the packing of ElasticAST (section 2.2).

Args:
    lengths: int64 [items], tokens of each item; zero is legal.
    max_tokens: most tokens in a bin, at least 0.
    max_items: most items in a bin, at least 1.

Returns:
    int64 [items], counting up from 0.

Raises:
    ValueError: a length is negative or exceeds max_tokens (the message names the item), a limit
        is out of range, or lengths is not one-dimensional.)");
}
