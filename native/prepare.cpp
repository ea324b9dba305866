// What a build does to every image beside decoding and encoding, with the results of OpenCV bit for bit
// (pipeline/build/images.py): shrinking by averaging areas, four to five times as fast as cv2.resize, and statistics of
// the pixels.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

// Which of `side` pixels in a row cover which of `size`, and with what share: `each` weights a pixel of the result,
// zeros where it has fewer. The steps in double, and the edges closer than a thousandth, are OpenCV's.
struct Taps {
    int64_t each;
    std::vector<int64_t> first;
    std::vector<float> weights;

    Taps(int64_t side, int64_t size) : first(size) {
        const double scale = 1.0 / (double(size) / side);
        each = int64_t(std::ceil(scale)) + 1;
        weights.resize(size * each);
        for (int64_t i = 0; i < size; ++i) {
            const double begin = i * scale, end = begin + scale, width = std::min(scale, side - begin);
            const int64_t last = std::min(int64_t(end), side - 1);
            int64_t pixel = std::min(int64_t(std::ceil(begin)), last);
            float* weight = &weights[i * each];
            first[i] = pixel;
            if (pixel - begin > 1e-3) {
                --first[i];
                *weight++ = float((pixel - begin) / width);
            }
            for (; pixel < last; ++pixel) *weight++ = float(1.0 / width);
            if (end - last > 1e-3) *weight = float(std::min({end - last, 1.0, width}) / width);
        }
    }
};

typedef float Four __attribute__((vector_size(16)));

// One row: `from` has room for the taps of zero weight beyond its end, `to` for one value more.
template <int EACH>
void squeeze(const float* from, const Taps& taps, float* to, int64_t size) {
    const int64_t each = EACH ? EACH : taps.each;
    const float* weight = taps.weights.data();
    for (int64_t i = 0; i < size; ++i, weight += each, to += 3) {
        const float* pixels = from + 3 * taps.first[i];
        Four sum = {0, 0, 0, 0};  // the fourth is the next pixel's, overwritten by it
        for (int64_t tap = 0; tap < each; ++tap) {
            Four pixel;
            std::memcpy(&pixel, pixels + 3 * tap, sizeof pixel);
            sum += pixel * weight[tap];
        }
        std::memcpy(to, &sum, sizeof sum);
    }
}

inline uint8_t rounded(float level) {
    const float shifted = level + 0x1.8p23f;  // leaves no bits for a fraction: rounds to nearest even
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return uint8_t(bits);
}

void shrink(const uint8_t* image, int64_t stride, int64_t side, uint8_t* out, int64_t size) {
    const Taps taps(side, size);
    const int64_t values = 3 * size;
    std::vector<float> row(3 * (side + taps.each) + 1), squeezed(values + 1), sum(values);
    int64_t held = -1;  // the row that is squeezed
    for (int64_t y = 0; y < size; ++y, out += values) {
        for (int64_t tap = 0; tap < taps.each; ++tap) {
            const float weight = taps.weights[y * taps.each + tap];
            if (weight == 0) break;
            if (taps.first[y] + tap != held) {
                held = taps.first[y] + tap;
                const uint8_t* levels = image + held * stride;
                for (int64_t i = 0; i < 3 * side; ++i) row[i] = levels[i];
                if (taps.each == 3)
                    squeeze<3>(row.data(), taps, squeezed.data(), size);
                else if (taps.each == 4)
                    squeeze<4>(row.data(), taps, squeezed.data(), size);
                else
                    squeeze<0>(row.data(), taps, squeezed.data(), size);
            }
            if (tap == 0)
                for (int64_t i = 0; i < values; ++i) sum[i] = weight * squeezed[i];
            else
                for (int64_t i = 0; i < values; ++i) sum[i] += weight * squeezed[i];
        }
        for (int64_t i = 0; i < values; ++i) out[i] = rounded(sum[i]);
    }
}

constexpr int64_t BLOCK = 256;  // pixels: their products fit in 32 bits, and they stay in the first-level cache

int32_t dot(const int16_t* a, const int16_t* b, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += int32_t(a[i]) * b[i];
    return sum;
}

}  // namespace

extern "C" {

// (side, side, 3) bytes, rows `stride` bytes apart -> (size, size, 3), size < side. 1 when there is no memory.
int shrink_image(const uint8_t* image, int64_t stride, int64_t side, uint8_t* out, int64_t size) try {
    shrink(image, stride, side, out, size);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Adds an image's values to `sums`, and over its pixels the sums of 00, 11, 22, 01, 12, 02 to `products`.
void add_image(const uint8_t* image, uint16_t* sums, int64_t* products, int64_t pixels) {
    int16_t channels[3][BLOCK];
    for (int64_t first = 0; first < pixels; first += BLOCK) {
        const int64_t count = std::min(BLOCK, pixels - first);
        const uint8_t* levels = image + 3 * first;
        uint16_t* sum = sums + 3 * first;
        for (int64_t i = 0; i < 3 * count; ++i) sum[i] += levels[i];
        for (int64_t i = 0; i < count; ++i)
            for (int c = 0; c < 3; ++c) channels[c][i] = levels[3 * i + c];
        for (int c = 0; c < 3; ++c) products[c] += dot(channels[c], channels[c], count);
        products[3] += dot(channels[0], channels[1], count);
        products[4] += dot(channels[1], channels[2], count);
        products[5] += dot(channels[0], channels[2], count);
    }
}

}  // extern "C"
