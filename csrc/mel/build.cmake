# The filterbank's kernels; included by CMakeLists.txt with `torch`, the folder of the package.

set(mel ${CMAKE_CURRENT_LIST_DIR})

# One shared object, which finds torch's libraries loaded already.
function(add_torch_kernels name)
  add_library(${name} MODULE ${ARGN})
  target_include_directories(${name} SYSTEM PRIVATE ${torch}/include)
  target_link_libraries(${name} PRIVATE ${torch}/lib/libtorch_cpu.so)
  target_link_options(${name} PRIVATE -Wl,--no-undefined)
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON)
  install(TARGETS ${name} DESTINATION .)
endfunction()

# --- CPU ---------------------------------------------------------------------------------------

# The kernel for one instruction set. Contraction to fused multiply-adds is what ISO mode forbids;
# errno and traps would keep the vectoriser from square roots and selections; -Wpsabi warns of
# vectors as arguments of functions, which are all inlined here.
function(add_cpu_kernel name lanes)
  add_library(${name} OBJECT ${mel}/cpu/kernel.cpp)
  target_compile_definitions(${name} PRIVATE FASTAST_KERNEL=${name} FASTAST_LANES=${lanes})
  target_compile_options(${name} PRIVATE -ffp-contract=fast -fno-math-errno -fno-trapping-math
                                         -Wno-psabi ${ARGN})
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_sources(mel_cpu PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()

add_library(mel_cpu STATIC ${mel}/cpu/filterbank.cpp)
set_target_properties(mel_cpu PROPERTIES POSITION_INDEPENDENT_CODE ON)
add_cpu_kernel(kBaselineKernel 4)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  target_compile_definitions(mel_cpu PRIVATE FASTAST_X86_KERNELS)
  add_cpu_kernel(kAvx2Kernel 8 -mavx2 -mfma)
  add_cpu_kernel(kAvx512Kernel 16 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma
                 -mprefer-vector-width=512)
endif()
add_torch_kernels(_mel_cpu ${mel}/cpu/operator.cpp)
target_link_libraries(_mel_cpu PRIVATE mel_cpu)

# For tests/csrc/test_mel_kernels.py, which builds it.
add_library(mel_harness MODULE EXCLUDE_FROM_ALL ${mel}/testing/harness.cpp)
target_link_libraries(mel_harness PRIVATE mel_cpu)
target_compile_options(mel_harness PRIVATE -Wno-psabi)
set_target_properties(mel_harness PROPERTIES PREFIX "" SUFFIX ".so" CXX_VISIBILITY_PRESET default)

# --- CUDA --------------------------------------------------------------------------------------

option(FASTAST_CUDA "Compile the CUDA kernel where nvcc is found" ON)
set(FASTAST_CUDA_ARCHS 80 86 89 90 100 120 CACHE STRING "GPU architectures, as in sm_90")

# nvcc from PATH, the usual folders, or the wheel nvidia-cuda-nvcc, which lies beside torch among
# the headers that torch's own dependencies bring.
cmake_path(GET torch PARENT_PATH site_packages)
file(GLOB wheels ${site_packages}/nvidia/cu[0-9]*)
find_program(nvcc nvcc PATHS $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda ${wheels}
             PATH_SUFFIXES bin NO_CACHE)
if(NOT FASTAST_CUDA)
  set(obstacle "FASTAST_CUDA is off")
elseif(NOT EXISTS ${torch}/lib/libtorch_cuda.so)
  set(obstacle "torch is built without CUDA")
elseif(NOT nvcc)
  set(obstacle "nvcc not found in PATH or CUDA_HOME; pip install nvidia-cuda-nvcc brings it")
else()
  # The runtime that torch itself has loaded, or else the toolkit's.
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE version COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCH "release ([0-9]+)" version "${version}")
  set(soname libcudart.so.${CMAKE_MATCH_1})
  cmake_path(GET nvcc PARENT_PATH toolkit)
  find_library(cudart ${soname} PATHS ${wheels} ${toolkit}/.. $ENV{CUDA_HOME} $ENV{CUDA_PATH}
               /usr/local/cuda PATH_SUFFIXES lib lib64 NO_CACHE)
  if(NOT cudart)
    set(obstacle "${soname}, which goes with ${nvcc}, not found")
  endif()
endif()
if(obstacle)
  message(STATUS "filterbank kernel for CUDA: skipped, ${obstacle}")
  return()
endif()
message(STATUS "filterbank kernel for CUDA: ${nvcc}, ${cudart}")

# A command instead of CMake's CUDA language, whose check of the compiler wants a whole toolkit.
execute_process(COMMAND ${nvcc} --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "sm_[0-9a-z]+" known "${known}")
foreach(arch IN LISTS FASTAST_CUDA_ARCHS)
  if(sm_${arch} IN_LIST known)
    list(APPEND targets -gencode arch=compute_${arch},code=sm_${arch})
    set(newest ${arch})
  endif()
endforeach()
list(APPEND targets -gencode arch=compute_${newest},code=compute_${newest})
file(GLOB mel_headers ${mel}/*.h ${mel}/cuda/*.h)
add_custom_command(
  OUTPUT mel_kernel.o
  COMMAND ${nvcc} -std=c++17 -O3 -DNDEBUG --threads 0 -Xcompiler -fPIC,-fvisibility=hidden
          ${targets} -c ${mel}/cuda/kernel.cu -o mel_kernel.o
  DEPENDS ${mel}/cuda/kernel.cu ${mel_headers}
  VERBATIM)
add_torch_kernels(_mel_cuda ${mel}/cuda/operator.cpp mel_kernel.o)
target_link_libraries(_mel_cuda PRIVATE ${torch}/lib/libtorch_cuda.so ${cudart})
