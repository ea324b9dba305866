// bfloat16 is passed as uint16_t: the upper half of a float, rounded to nearest even.

#pragma once

#include <cstdint>
#include <cstring>

inline float load(float value) { return value; }
inline float load(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline void store(float* to, float value) { *to = value; }
inline void store(uint16_t* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *to = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
