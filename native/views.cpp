// Views of decoded images in one pass: crop, mirror, colour shift, mean (pipeline/load/views.py).
//
// A row of a crop is contiguous in the image, in the mean image and in the output, so one simple loop, which compilers
// vectorise, does all of the arithmetic. A row that is flipped is mirrored first, while its values are bytes, into a
// buffer that stays in the first-level cache; the mean image comes with its mirror image. Threads end with each call:
// OpenMP's would spin for a while after it, on cores that DALI's threads need for the next batch.

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

// Reverses a row of pixels, five at a time: 15 of 16 bytes.
void mirror(const uint8_t* from, uint8_t* to, int64_t pixels) {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    for (; pixels > 5; pixels -= 5, to += 15) {
        Bytes five;
        std::memcpy(&five, from + 3 * pixels - 16, sizeof five);
#ifdef __clang__
        five = __builtin_shufflevector(five, five, 13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, 0);
#else
        five = __builtin_shuffle(five, Bytes{13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, 0});
#endif
        std::memcpy(to, &five, sizeof five);  // the next pixels overwrite the 16th byte
    }
    for (; pixels > 0; --pixels, to += 3) std::memcpy(to, from + 3 * (pixels - 1), 3);
}

// Writes one view. `means` has the rows of the mean image, each followed by its mirror image.
template <class T>
void view(const uint8_t* image, const float* means, const int32_t* anchor, bool flip, T* out, int64_t size,
          int64_t crop, const float* shift_row, uint8_t* mirrored) {
    const int64_t values = 3 * crop, left = flip ? 2 * size - crop - anchor[1] : anchor[1];
    for (int64_t y = 0; y < crop; ++y, out += values) {
        const uint8_t* levels = image + ((anchor[0] + y) * size + anchor[1]) * 3;
        const float* average = means + ((anchor[0] + y) * 2 * size + left) * 3;
        // prefetch two rows ahead: the hardware's prefetcher stops at page boundaries
        for (int64_t i = 0; i < values && y + 2 < crop; i += 64) __builtin_prefetch(levels + 2 * 3 * size + i);
        if (flip) {
            mirror(levels, mirrored, crop);
            levels = mirrored;
        }
#pragma omp simd
        for (int64_t i = 0; i < values; ++i) store(out + i, float(levels[i]) - average[i] + shift_row[i]);
    }
}

struct Scratch {
    std::vector<float> shift_row;
    std::vector<uint8_t> mirrored;
};

// Returns 0, or 1 if the memory for a few rows cannot be allocated.
template <class T>
int views(const uint8_t* images, const float* means, const int32_t* anchors, const int32_t* flips,
          const float* shifts, T* out, int64_t count, int64_t views_per_image, int64_t size, int64_t crop,
          int64_t threads) try {
    threads = std::max<int64_t>(1, std::min(threads, count));
    const Scratch empty{std::vector<float>(3 * crop), std::vector<uint8_t>(3 * crop)};
    std::vector<Scratch> scratch(threads, empty);
    std::vector<std::thread> others;
    others.reserve(threads);  // after this, only the start of a thread can fail
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t thread) {
        float* shift_row = scratch[thread].shift_row.data();
        for (int64_t i; (i = next++) < count;) {
            for (int64_t j = 0; j < 3 * crop; ++j) shift_row[j] = shifts[3 * i + j % 3];
            view(images + i / views_per_image * size * size * 3, means, anchors + 2 * i, flips[i] != 0,
                 out + i * crop * crop * 3, size, crop, shift_row, scratch[thread].mirrored.data());
        }
    };
    try {
        for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
    } catch (const std::exception&) {  // a limit on threads or memory: the started threads do the work
    }
    work(0);
    for (auto& other : others) other.join();
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

}  // namespace

extern "C" {

int views_float32(const uint8_t* images, const float* means, const int32_t* anchors, const int32_t* flips,
                   const float* shifts, float* out, int64_t count, int64_t views_per_image, int64_t size,
                   int64_t crop, int64_t threads) {
    return views(images, means, anchors, flips, shifts, out, count, views_per_image, size, crop, threads);
}
int views_bfloat16(const uint8_t* images, const float* means, const int32_t* anchors, const int32_t* flips,
                    const float* shifts, uint16_t* out, int64_t count, int64_t views_per_image, int64_t size,
                    int64_t crop, int64_t threads) {
    return views(images, means, anchors, flips, shifts, out, count, views_per_image, size, crop, threads);
}

}  // extern "C"
