/* Alarms. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "lua/net_bind.h"
#include "net/alarm.h"

typedef struct {
  int fd; /* -1: closed */
} alarm_clock;

static alarm_clock *check(lua_State *L) { return luaL_checkudata(L, 1, MRN_ALARM_TYPE); }

static int new_alarm(lua_State *L) {
  alarm_clock *a = lua_newuserdata(L, sizeof *a);
  a->fd = -1;
  luaL_getmetatable(L, MRN_ALARM_TYPE);
  lua_setmetatable(L, -2);
  a->fd = mrn_alarm_new();
  if (a->fd >= 0) return 1;
  lua_pushnil(L);
  lua_pushstring(L, strerror(errno));
  return 2;
}

static int alarm_fd(lua_State *L) {
  lua_pushinteger(L, check(L)->fd);
  return 1;
}

static int alarm_set(lua_State *L) {
  const alarm_clock *a = check(L);
  lua_Number seconds = luaL_checknumber(L, 2);
  luaL_argcheck(L, seconds == seconds, 2, "not a number");
  luaL_argcheck(L, a->fd >= 0, 1, "closed");
  if (!mrn_alarm_set(a->fd, seconds)) return luaL_error(L, "setting an alarm: %s", strerror(errno));
  return 0;
}

static int alarm_close(lua_State *L) {
  alarm_clock *a = check(L);
  if (a->fd >= 0) close(a->fd);
  a->fd = -1;
  return 0;
}

void mrn_bind_alarm(lua_State *L) {
  static const luaL_Reg methods[] = {{"fd", alarm_fd},         {"set", alarm_set},
                                     {"close", alarm_close},   {"__gc", alarm_close},
                                     {"__close", alarm_close}, {NULL, NULL}};
  mr_new_type(L, MRN_ALARM_TYPE, methods);
  lua_pushcfunction(L, new_alarm);
  lua_setfield(L, -2, "alarm");
}
