// The error tree of the native core. Each type maps to one Python exception in the binding.
//
//   Error
//   |- InvalidArgument   the caller handed over a wrong shape, value or name
//   |- Unsupported       this CPU or kernel cannot do what was asked for
//   |- Cancelled         the caller's cancel token fired between two tiles
//   `- DeadlineExceeded  the cancel token's deadline passed between two tiles
#pragma once

#include <stdexcept>
#include <string>

namespace kt_expert {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class InvalidArgument : public Error {
 public:
  using Error::Error;
};

class Unsupported : public Error {
 public:
  using Error::Error;
};

class Cancelled : public Error {
 public:
  using Error::Error;
};

class DeadlineExceeded : public Error {
 public:
  using Error::Error;
};

}  // namespace kt_expert
