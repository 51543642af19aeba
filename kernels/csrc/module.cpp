// The importable gr_kernels._C. Importing it loads this library, whose static initialisers register the operators
// (TORCH_LIBRARY_FRAGMENT(gr_kernels, ...) in every other source); the module itself is empty.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
