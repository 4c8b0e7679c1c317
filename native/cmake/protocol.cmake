# Generates the Python code of the protocol beside its .proto files (git ignores it) and installs it into the wheel.
set(PROTO_ROOT ${CMAKE_CURRENT_SOURCE_DIR}/../proto)
set(PROTO_DIR kt_expert_proto/v1)
set(PROTO_FILES ${PROTO_ROOT}/${PROTO_DIR}/service.proto ${PROTO_ROOT}/${PROTO_DIR}/session.proto)
set(PROTO_GENERATED "")
foreach(name service session)
  list(APPEND PROTO_GENERATED
    ${PROTO_ROOT}/${PROTO_DIR}/${name}_pb2.py
    ${PROTO_ROOT}/${PROTO_DIR}/${name}_pb2.pyi)
endforeach()
list(APPEND PROTO_GENERATED ${PROTO_ROOT}/${PROTO_DIR}/service_pb2_grpc.py)
add_custom_command(
  OUTPUT ${PROTO_GENERATED}
  COMMAND ${Python_EXECUTABLE} -m grpc_tools.protoc -I${PROTO_ROOT} --python_out=${PROTO_ROOT}
          --pyi_out=${PROTO_ROOT} ${PROTO_FILES}
  COMMAND ${Python_EXECUTABLE} -m grpc_tools.protoc -I${PROTO_ROOT} --grpc_python_out=${PROTO_ROOT}
          ${PROTO_ROOT}/${PROTO_DIR}/service.proto
  DEPENDS ${PROTO_FILES}
  COMMENT "Generating protocol code"
  VERBATIM)
add_custom_target(protocol ALL DEPENDS ${PROTO_GENERATED})
install(FILES ${PROTO_GENERATED} DESTINATION ${PROTO_DIR})
