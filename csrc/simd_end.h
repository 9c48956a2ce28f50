// Closes what simd.h opened.
}  // namespace FA_ISA
}  // namespace
}  // namespace fa
#undef FA_ISA
#undef FA_BYTES
