// The Python module fused_attn._C. It is empty: importing it loads this shared object, whose static initialisers
// register the kernels of csrc/cpu with PyTorch's dispatcher (torch.ops.fused_attn).

// The wheel's tag promises Python 3.10. torch's build defines its own floor, which may rise above that.
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT,
      "_C",
      "C++ kernels of fused_attn, registered as torch.ops.fused_attn.",
      0,
      nullptr,
      nullptr,
      nullptr,
      nullptr,
      nullptr,
  };
  return PyModule_Create(&definition);
}
