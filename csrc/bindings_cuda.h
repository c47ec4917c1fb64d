// Adds to vtts_rt._C what runs on CUDA devices, or says that this build has nothing of it.
#pragma once

#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_& m);
