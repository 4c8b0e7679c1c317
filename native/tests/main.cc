#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstring>
#include <iostream>

#include "isas.h"

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list-kernels") == 0) {
    for (const std::string& name : kt_expert::all_kernels()) std::cout << "kernel " << name << "\n";
    return 0;
  }
  doctest::Context context(argc, argv);
  const int status = context.run();
  kt_expert::write_report();
  return status;
}
