#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "rungs.h"

int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  const int status = context.run();
  kt_expert::write_report();
  return status;
}
