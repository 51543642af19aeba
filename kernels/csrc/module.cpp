// The importable gr_kernels._C. Importing it loads this library, whose static initialisers register the operators
// (TORCH_LIBRARY_FRAGMENT(gr_kernels, ...) in every other source); the module itself has
// but one constant: `cuda`, the CUDA version (13000 for 13.0) its GPU operators were compiled with, 0 without them.
#include <Python.h>

#ifdef GR_KERNELS_WITH_CUDA
#include <cuda.h>
#else
#define CUDA_VERSION 0
#endif

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddIntConstant(module, "cuda", CUDA_VERSION) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
