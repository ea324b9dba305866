// Views of decoded images in one pass: crop, mirror, colour shift, mean (pipeline/views.py).
//
// A row of a crop is contiguous in the image, in the mean image and in the output, so that one plain loop, which
// compilers turn into vector instructions, does all of the arithmetic. A mirrored row is made in a buffer that stays
// in the first-level cache and copied from there pixel by pixel, last pixel first. Threads live for one call: OpenMP's
// would spin for a while after it, where DALI's threads want the cores for the next batch.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include "bfloat16.h"

namespace {

// Moves four values a pixel, one instruction each way; the next pixel overwrites the fourth, for which `from` has
// room.
template <class T>
void mirror(const T* from, T* to, int64_t pixels) {
    for (from += 3 * (pixels - 1); pixels > 1; --pixels, from -= 3, to += 3) std::memcpy(to, from, 4 * sizeof(T));
    std::memcpy(to, from, 3 * sizeof(T));
}

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
        if (flip) mirror(mirrored, out + y * values, crop);
    }
}

template <class T>
struct Scratch {
    std::vector<float> shift_row;
    std::vector<T> mirrored;
};

// 0, or 1 when there is no memory for a few rows.
template <class T>
int views(const uint8_t* images, const float* mean, const int32_t* anchors, const int32_t* flips,
          const float* shifts, T* out, int64_t count, int64_t views_an_image, int64_t size, int64_t crop,
          int64_t threads) try {
    threads = std::max<int64_t>(1, std::min(threads, count));
    const Scratch<T> empty{std::vector<float>(3 * crop), std::vector<T>(3 * crop + 1)};
    std::vector<Scratch<T>> scratch(threads, empty);
    std::vector<std::thread> others;
    others.reserve(threads);  // from here on only the start of a thread can fail
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t thread) {
        float* shift_row = scratch[thread].shift_row.data();
        for (int64_t i; (i = next++) < count;) {
            for (int64_t j = 0; j < 3 * crop; ++j) shift_row[j] = shifts[3 * i + j % 3];
            view(images + i / views_an_image * size * size * 3, mean, anchors + 2 * i, flips[i] != 0,
                 out + i * crop * crop * 3, size, crop, shift_row, scratch[thread].mirrored.data());
        }
    };
    try {
        for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
    } catch (const std::exception&) {  // a limit on threads or memory: those that there are do the work
    }
    work(0);
    for (auto& other : others) other.join();
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

}  // namespace

extern "C" {

int views_float32(const uint8_t* images, const float* mean, const int32_t* anchors, const int32_t* flips,
                   const float* shifts, float* out, int64_t count, int64_t views_an_image, int64_t size,
                   int64_t crop, int64_t threads) {
    return views(images, mean, anchors, flips, shifts, out, count, views_an_image, size, crop, threads);
}
int views_bfloat16(const uint8_t* images, const float* mean, const int32_t* anchors, const int32_t* flips,
                    const float* shifts, uint16_t* out, int64_t count, int64_t views_an_image, int64_t size,
                    int64_t crop, int64_t threads) {
    return views(images, mean, anchors, flips, shifts, out, count, views_an_image, size, crop, threads);
}

}  // extern "C"
