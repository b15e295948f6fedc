// The thin Python module: facts of the build, and the random generator for tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "build_facts.h"
#include "cpu/dispatch.h"
#include "philox.h"

namespace py = pybind11;

namespace {

using Words = py::array_t<uint32_t, py::array::c_style>;

std::string torch_target_version() {
  constexpr uint64_t version = FASTDFA_TORCH_TARGET_VERSION;
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
}

py::object text_or_none(const std::string& text) {
  if (text.empty()) return py::none();
  return py::str(text);
}

py::dict build_facts() {
  py::dict capabilities;
  constexpr const char* compiled[][2] = {FASTDFA_CAPABILITIES};
  for (auto [name, flags] : compiled) capabilities[name] = flags;

  py::dict facts;
  facts["compiler"] = FASTDFA_COMPILER;
  facts["build_type"] = FASTDFA_BUILD_TYPE;
  facts["flags"] = FASTDFA_FLAGS;
  facts["torch_target"] = torch_target_version();
  facts["torch_built_against"] = text_or_none(FASTDFA_TORCH_VERSION);
  facts["cpu_capability"] = fastdfa::cpu_capability();
  facts["cpu_capabilities"] = capabilities;
  facts["bfloat16_products"] = fastdfa::multiplies_bfloat16();
  facts["cuda"] = text_or_none(FASTDFA_CUDA_VERSION);
  facts["cuda_architectures"] = text_or_none(FASTDFA_CUDA_ARCHITECTURES);
  facts["cuda_skipped"] = text_or_none(FASTDFA_CUDA_SKIPPED);
  return facts;
}

// counter [n, 4], key [n, 2] or [1, 2] -> the generator's words [n, 4].
Words philox(const Words& counter, const Words& key) {
  if (counter.ndim() != 2 || counter.shape(1) != 4)
    throw py::value_error("counter must have shape [n, 4]");
  const py::ssize_t n = counter.shape(0);
  if (key.ndim() != 2 || key.shape(1) != 2 || (key.shape(0) != n && key.shape(0) != 1))
    throw py::value_error("key must have shape [n, 2] or [1, 2]");

  Words out({n, py::ssize_t{4}});
  auto c = counter.unchecked<2>();
  auto k = key.unchecked<2>();
  auto w = out.mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < n; ++i) {
    const py::ssize_t j = key.shape(0) == 1 ? 0 : i;
    uint64_t words[4] = {c(i, 0), c(i, 1), c(i, 2), c(i, 3)};
    fastdfa::philox4x32_10(words, k(j, 0), k(j, 1));
    for (int v = 0; v < 4; ++v) w(i, v) = static_cast<uint32_t>(words[v]);
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_ext, m) {
  m.doc() = "Facts of the build, and the random generator for tests.";
  m.def("build_facts", &build_facts, "How the extension was built, as a dict.");
  m.def("philox", &philox, py::arg("counter"), py::arg("key"),
        "Philox4x32-10 words [n, 4] of counter [n, 4] and key [n or 1, 2], all uint32.");
}
