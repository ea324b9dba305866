// Views of decoded images in one pass: crop, mirror, colour shift, mean (pipeline/views.py).
//
// A row of a crop is contiguous in the image, in the mean image and in the output, so that one plain loop, which
// compilers turn into vector instructions, does all of the arithmetic. A mirrored row is made in a buffer that stays
// in the first-level cache and copied from there pixel by pixel. Threads live for one call: OpenMP's would spin
// between calls, on the cores that decode the next batch.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

inline void store(float* to, float value) { *to = value; }
// bfloat16 travels as uint16_t: the upper half of a float, rounded to nearest even.
inline void store(uint16_t* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *to = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <class T>
struct Pixel {
    T channels[3];
};

template <class T>
void view(const uint8_t* image, const float* mean, const int32_t* anchor, bool flip, T* out, int64_t size,
          int64_t crop, const float* shift_row, T* mirrored) {
    const int64_t values = 3 * crop;
    for (int64_t y = 0; y < crop; ++y) {
        const int64_t begin = ((anchor[0] + y) * size + anchor[1]) * 3;
        const uint8_t* levels = image + begin;
        const float* average = mean + begin;
        T* row = flip ? mirrored : out + y * values;
#pragma omp simd
        for (int64_t i = 0; i < values; ++i) store(row + i, float(levels[i]) + shift_row[i] - average[i]);
        if (flip) {
            const auto* from = reinterpret_cast<const Pixel<T>*>(mirrored) + crop;
            auto* to = reinterpret_cast<Pixel<T>*>(out + y * values);
            for (int64_t x = 0; x < crop; ++x) to[x] = *--from;
        }
    }
}

template <class T>
void views(const uint8_t* images, const float* mean, const int32_t* anchors, const int32_t* flips,
           const float* shifts, T* out, int64_t count, int64_t views_an_image, int64_t size, int64_t crop,
           int threads) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        std::vector<float> shift_row(3 * crop);
        std::vector<T> mirrored(3 * crop);
        for (int64_t i; (i = next++) < count;) {
            for (int64_t j = 0; j < 3 * crop; ++j) shift_row[j] = shifts[3 * i + j % 3];
            view(images + i / views_an_image * size * size * 3, mean, anchors + 2 * i, flips[i] != 0,
                 out + i * crop * crop * 3, size, crop, shift_row.data(), mirrored.data());
        }
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min<int64_t>(threads, count); ++i) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
}

}  // namespace

extern "C" {

void views_float32(const uint8_t* images, const float* mean, const int32_t* anchors, const int32_t* flips,
                   const float* shifts, float* out, int64_t count, int64_t views_an_image, int64_t size,
                   int64_t crop, int threads) {
    views(images, mean, anchors, flips, shifts, out, count, views_an_image, size, crop, threads);
}
void views_bfloat16(const uint8_t* images, const float* mean, const int32_t* anchors, const int32_t* flips,
                    const float* shifts, uint16_t* out, int64_t count, int64_t views_an_image, int64_t size,
                    int64_t crop, int threads) {
    views(images, mean, anchors, flips, shifts, out, count, views_an_image, size, crop, threads);
}

}  // extern "C"
