/* Listening. */
#include <string.h>
#include <unistd.h>

#include "lua/net_bind.h"
#include "net/listen.h"
#include "net/stream.h"

typedef struct {
  int fd; /* -1: closed */
} server;

static server *check(lua_State *L) { return luaL_checkudata(L, 1, MRN_SERVER_TYPE); }

/* Names are not looked up here: that would block. */
static mrn_status listen_address(lua_State *L, mrn_address *address, mrn_error *err) {
  size_t length;
  const char *host = luaL_checklstring(L, 1, &length);
  if (lua_isnoneornil(L, 2)) return mrn_address_unix(host, length, address, err);
  int port = mrn_check_port(L, 2);
  if (strcmp(host, "localhost") == 0) host = "127.0.0.1";
  if (strcmp(host, "*") == 0) host = "0.0.0.0";
  if (mrn_address_literal(host, port, address)) return MRN_OK;
  return mrn_fail(err, MRN_REFUSED, "%.100s is not an address of this machine", host);
}

static int listen_on(lua_State *L) {
  mrn_error err;
  mrn_address address;
  mrn_status status = listen_address(L, &address, &err);
  server *s = lua_newuserdata(L, sizeof *s);
  s->fd = -1;
  luaL_getmetatable(L, MRN_SERVER_TYPE);
  lua_setmetatable(L, -2);
  if (status == MRN_OK) s->fd = mrn_listen(&address, &err);
  if (s->fd >= 0) return 1;
  lua_pushnil(L);
  lua_pushstring(L, err.text);
  return 2;
}

static int server_fd(lua_State *L) {
  lua_pushinteger(L, check(L)->fd);
  return 1;
}

static int server_port(lua_State *L) {
  const server *s = check(L);
  lua_pushinteger(L, s->fd < 0 ? 0 : mrn_listen_port(s->fd));
  return 1;
}

static int server_accept(lua_State *L) {
  mrn_error err;
  int fd;
  server *s = check(L);
  if (s->fd < 0) return mrn_push_failure(L, mrn_fail(&err, MRN_CLOSED, "closed"), &err);
  mrn_stream *stream = mrn_push_stream(L);
  mrn_status status = mrn_accept(s->fd, &fd, &err);
  if (status != MRN_OK) return mrn_push_failure(L, status, &err);
  mrn_stream_adopt(stream, fd);
  return 1;
}

static int server_close(lua_State *L) {
  server *s = check(L);
  if (s->fd >= 0) close(s->fd);
  s->fd = -1;
  return 0;
}

void mrn_bind_server(lua_State *L) {
  static const luaL_Reg methods[] = {{"fd", server_fd},
                                     {"port", server_port},
                                     {"accept", server_accept},
                                     {"close", server_close},
                                     {"__gc", server_close},
                                     {"__close", server_close},
                                     {NULL, NULL}};
  mr_new_type(L, MRN_SERVER_TYPE, methods);
  lua_pushcfunction(L, listen_on);
  lua_setfield(L, -2, "listen");
}
