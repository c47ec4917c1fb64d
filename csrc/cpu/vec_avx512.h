// A vector of AVX-512, for the files that include it with their VTTS_INLINE.
struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  VTTS_INLINE static Vec of_bits(__m512i bits) { return {_mm512_castsi512_ps(bits)}; }
  VTTS_INLINE static Vec zero() { return {_mm512_setzero_ps()}; }
  VTTS_INLINE static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  VTTS_INLINE static Vec load(const int8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
  }
  VTTS_INLINE static Vec load(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return of_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  template <typename T>
  VTTS_INLINE static Vec load_part(const T* from, int count) {
    T part[kLanes] = {};
    std::copy(from, from + count, part);
    return load(part);
  }
  // The weights of 16 outputs at a step of `ByChannel`; those of BFloat16 stand in pairs.
  template <typename T>
  VTTS_INLINE static Vec load_weights(const T* from, int) {
    return load(from);
  }
  VTTS_INLINE static Vec load_weights(const BFloat16* from, int step) {
    const __m512i pairs = _mm512_loadu_si512(from);
    return of_bits(step == 0 ? _mm512_slli_epi32(pairs, 16)
                             : _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
  }
  VTTS_INLINE static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  VTTS_INLINE static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  VTTS_INLINE static Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  VTTS_INLINE static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  VTTS_INLINE void store(float* to) const { _mm512_storeu_ps(to, v); }
  // Rounded to nearest, ties to even; a NaN stays one.
  VTTS_INLINE void store(BFloat16* to) const {
    const __m512i whole = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(whole, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded =
        _mm512_mask_or_epi32(_mm512_add_epi32(whole, half), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                             whole, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  // Sixteen lines of sixteen channels to sixteen channels of sixteen lines.
  VTTS_INLINE static void transpose(Vec (&all)[kLanes]) {
    __m512 pairs[16], fours[16], eights[16];
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(all[i].v, all[i + 1].v);
      pairs[i + 1] = _mm512_unpackhi_ps(all[i].v, all[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
      fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    // A quarter of a register is a block of four channels: blocks change places.
    for (int i = 0; i < 8; ++i) {
      const int at = i < 4 ? i : i + 4;
      eights[at] = _mm512_shuffle_f32x4(fours[at], fours[at + 4], 0x88);
      eights[at + 4] = _mm512_shuffle_f32x4(fours[at], fours[at + 4], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      all[i].v = _mm512_shuffle_f32x4(eights[i], eights[i + 8], 0x88);
      all[i + 8].v = _mm512_shuffle_f32x4(eights[i], eights[i + 8], 0xdd);
    }
  }
};

VTTS_INLINE void prefetch(const void* from) {
  _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0);
}
