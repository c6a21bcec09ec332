/* Streams; and how they meet an engine of moonrabbit.core. */
#include "lua/net_bind.h"
#include "lua/port.h"
#include "net/stream.h"

#define READ_MAX 16384

mrn_stream *mrn_push_stream(lua_State *L) {
  mrn_stream *stream = lua_newuserdata(L, sizeof *stream);
  mrn_stream_init(stream);
  luaL_getmetatable(L, MRN_STREAM_TYPE);
  lua_setmetatable(L, -2);
  return stream;
}

static mrn_stream *check(lua_State *L) { return luaL_checkudata(L, 1, MRN_STREAM_TYPE); }

static int connect_stream(lua_State *L) {
  mrn_error err;
  const mrn_address *address = luaL_checkudata(L, 1, MRN_ADDRESS_TYPE);
  mrn_tls_context *context = mrn_opt_tls(L, 2);
  const char *server_name = lua_isnoneornil(L, 3) ? NULL : mrn_check_text(L, 3);
  mrn_stream *stream = mrn_push_stream(L);
  mrn_status status = mrn_stream_connect(stream, address, context, server_name, &err);
  return status == MRN_OK ? 1 : mrn_push_failure(L, status, &err);
}

static int stream_fd(lua_State *L) {
  lua_pushinteger(L, check(L)->fd);
  return 1;
}

static int stream_wants(lua_State *L) {
  lua_pushlstring(L, &check(L)->wants, 1);
  return 1;
}

static int push_true(lua_State *L, mrn_status status, const mrn_error *err) {
  if (status != MRN_OK) return mrn_push_failure(L, status, err);
  lua_pushboolean(L, 1);
  return 1;
}

static int stream_handshake(lua_State *L) {
  mrn_error err;
  mrn_status status = mrn_stream_handshake(check(L), &err);
  return push_true(L, status, &err);
}

/* ---- the engine's bytes ---- */

/* False: the engine was closed. */
static bool buffers_of(lua_State *L, int index, mrn_buffers *buffers) {
  const mr_port *port = luaL_checkudata(L, index, MR_ENGINE_TYPE);
  if (port->ctx == NULL) return false;
  if (port->calls->version != MR_PORT_VERSION) {
    luaL_error(L, "moonrabbit.core and moonrabbit.net are of different versions");
  }
  buffers->reserve = port->calls->rx_reserve;
  buffers->commit = port->calls->rx_commit;
  buffers->peek = port->calls->tx_peek;
  buffers->consume = port->calls->tx_consume;
  buffers->ctx = port->ctx;
  return true;
}

static int engine_closed(lua_State *L) {
  mrn_error err;
  return mrn_push_failure(L, mrn_fail(&err, MRN_CLOSED, "the engine is closed"), &err);
}

static int stream_fill(lua_State *L) {
  mrn_error err;
  mrn_buffers buffers;
  size_t n = 0;
  mrn_stream *stream = check(L);
  double now = luaL_optnumber(L, 3, -1);
  if (!buffers_of(L, 2, &buffers)) return engine_closed(L);
  mrn_status status = mrn_stream_fill(stream, &buffers, now, &n, &err);
  if (status != MRN_OK) return mrn_push_failure(L, status, &err);
  lua_pushinteger(L, (lua_Integer)n);
  return 1;
}

/* fill_within(engine, seconds): waits here, in the kernel, where `fill` answers "again". */
static int stream_fill_within(lua_State *L) {
  mrn_error err;
  mrn_buffers buffers;
  size_t n = 0;
  mrn_stream *stream = check(L);
  double seconds = luaL_checknumber(L, 3);
  luaL_argcheck(L, seconds >= 0 && stream->tls == NULL, 3, "a plain stream and seconds expected");
  if (!buffers_of(L, 2, &buffers)) return engine_closed(L);
  mrn_status status = mrn_stream_await(stream, seconds, &err);
  if (status == MRN_OK) status = mrn_stream_fill(stream, &buffers, -1, &n, &err);
  if (status != MRN_OK) return mrn_push_failure(L, status, &err);
  lua_pushinteger(L, (lua_Integer)n);
  return 1;
}

static int stream_flush(lua_State *L) {
  mrn_error err;
  mrn_buffers buffers;
  mrn_stream *stream = check(L);
  double now = luaL_optnumber(L, 3, -1);
  if (!buffers_of(L, 2, &buffers)) return engine_closed(L);
  mrn_status status = mrn_stream_flush(stream, &buffers, now, &err);
  return push_true(L, status, &err);
}

/* ---- plain bytes ---- */

static int stream_read(lua_State *L) {
  mrn_error err;
  char bytes[READ_MAX];
  size_t n = 0;
  mrn_stream *stream = check(L);
  lua_Integer most = luaL_optinteger(L, 2, READ_MAX);
  luaL_argcheck(L, most >= 1, 2, "at least one byte expected");
  if (most > READ_MAX) most = READ_MAX;
  mrn_status status = mrn_stream_read(stream, bytes, (size_t)most, &n, &err);
  if (status != MRN_OK) return mrn_push_failure(L, status, &err);
  lua_pushlstring(L, bytes, n);
  return 1;
}

static int stream_write(lua_State *L) {
  mrn_error err;
  size_t length, n = 0;
  mrn_stream *stream = check(L);
  const char *bytes = luaL_checklstring(L, 2, &length);
  lua_Integer from = luaL_optinteger(L, 3, 1);
  luaL_argcheck(L, from >= 1 && (size_t)from <= length + 1, 3, "outside the string");
  size_t start = (size_t)from - 1;
  mrn_status status = mrn_stream_write(stream, bytes + start, length - start, &n, &err);
  if (status != MRN_OK) return mrn_push_failure(L, status, &err);
  lua_pushinteger(L, (lua_Integer)n);
  return 1;
}

static int stream_settle(lua_State *L) {
  mrn_error err;
  mrn_status status = mrn_stream_settle(check(L), &err);
  return push_true(L, status, &err);
}

/* ---- the rest ---- */

static int stream_describe(lua_State *L) {
  char text[160];
  mrn_stream_describe(check(L), text, sizeof text);
  if (text[0] == '\0') return 0;
  lua_pushstring(L, text);
  return 1;
}

static int stream_close(lua_State *L) {
  mrn_stream_close(check(L));
  return 0;
}

static int stream_collect(lua_State *L) {
  mrn_stream_drop(check(L));
  return 0;
}

void mrn_bind_stream(lua_State *L) {
  static const luaL_Reg methods[] = {{"fd", stream_fd},
                                     {"wants", stream_wants},
                                     {"handshake", stream_handshake},
                                     {"fill", stream_fill},
                                     {"fill_within", stream_fill_within},
                                     {"flush", stream_flush},
                                     {"read", stream_read},
                                     {"write", stream_write},
                                     {"settle", stream_settle},
                                     {"tls_info", stream_describe},
                                     {"close", stream_close},
                                     {"__gc", stream_collect},
                                     {"__close", stream_close},
                                     {NULL, NULL}};
  mr_new_type(L, MRN_STREAM_TYPE, methods);
  lua_pushcfunction(L, connect_stream);
  lua_setfield(L, -2, "connect");
}
