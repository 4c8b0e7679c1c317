#include "kt_expert/weight_format.h"

#include "kt_expert/error.h"

namespace kt_expert {

std::vector<WeightFormat> all_weight_formats() {
  std::vector<WeightFormat> formats;
  for (int f = 0; f < kWeightFormats; ++f) formats.push_back(static_cast<WeightFormat>(f));
  return formats;
}

const char* weight_format_name(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return "bf16";
    case WeightFormat::kInt8:
      return "int8";
    case WeightFormat::kInt4G32:
      return "int4-g32";
    case WeightFormat::kInt4G128:
      return "int4-g128";
    case WeightFormat::kFp8:
      return "fp8";
    case WeightFormat::kMxfp4:
      return "mxfp4";
    case WeightFormat::kNf4:
      return "nf4";
  }
  return "unknown";
}

WeightFormat weight_format_from_name(const std::string& name) {
  std::string known;
  for (WeightFormat format : all_weight_formats()) {
    if (name == weight_format_name(format)) return format;
    known += known.empty() ? weight_format_name(format) : std::string(", ") + weight_format_name(format);
  }
  throw InvalidArgument("weight format '" + name + "' is not known; choose one of: " + known);
}

}  // namespace kt_expert
