/* Waiting: descriptors and signals. */
#include <errno.h>
#include <string.h>

#include "lua/net_bind.h"
#include "net/poll.h"
#include "net/signals.h"

typedef struct {
  mrn_poller *poller; /* NULL: closed */
} holder;

static int new_poller(lua_State *L) {
  holder *h = lua_newuserdata(L, sizeof *h);
  h->poller = NULL;
  luaL_getmetatable(L, MRN_POLLER_TYPE);
  lua_setmetatable(L, -2);
  h->poller = mrn_poller_new();
  if (h->poller == NULL) return luaL_error(L, "no poller: %s", strerror(errno));
  return 1;
}

static mrn_poller *check(lua_State *L) {
  const holder *h = luaL_checkudata(L, 1, MRN_POLLER_TYPE);
  if (h->poller == NULL) luaL_error(L, "the poller is closed");
  return h->poller;
}

static unsigned check_events(lua_State *L, int index) {
  unsigned events = 0;
  for (const char *c = luaL_checkstring(L, index); *c != '\0'; c++) {
    if (*c == 'r')
      events |= MRN_READ;
    else if (*c == 'w')
      events |= MRN_WRITE;
    else
      luaL_argerror(L, index, "\"r\", \"w\", \"rw\" or \"\" expected");
  }
  return events;
}

static int poller_set(lua_State *L) {
  mrn_error err;
  mrn_poller *poller = check(L);
  int fd = (int)luaL_checkinteger(L, 2);
  if (mrn_poller_set(poller, fd, check_events(L, 3), &err) == MRN_OK) {
    lua_pushboolean(L, 1);
    return 1;
  }
  lua_pushnil(L);
  lua_pushstring(L, err.text);
  return 2;
}

static int poller_wait(lua_State *L) {
  mrn_poller *poller = check(L);
  double timeout = lua_isnoneornil(L, 2) ? -1 : luaL_checknumber(L, 2);
  if (!lua_isnoneornil(L, 2) && !(timeout > 0)) timeout = 0;
  int ready = mrn_poller_wait(poller, timeout);
  if (ready < 0) return luaL_error(L, "waiting for descriptors: %s", strerror(errno));
  lua_pushinteger(L, ready);
  return 1;
}

static int poller_next(lua_State *L) {
  int fd;
  unsigned events;
  if (!mrn_poller_next(check(L), &fd, &events)) return 0;
  lua_pushinteger(L, fd);
  lua_pushboolean(L, (events & MRN_READ) != 0);
  lua_pushboolean(L, (events & MRN_WRITE) != 0);
  return 3;
}

static int poller_close(lua_State *L) {
  holder *h = luaL_checkudata(L, 1, MRN_POLLER_TYPE);
  mrn_poller_free(h->poller);
  h->poller = NULL;
  return 0;
}

/* ---- signals ---- */

static int watch_signal(lua_State *L) {
  int number = mrn_signal_number(luaL_checkstring(L, 1));
  luaL_argcheck(L, number != 0, 1, "unknown signal");
  if (!lua_toboolean(L, 2)) {
    mrn_signal_off(number);
  } else if (!mrn_signal_on(number, lua_toboolean(L, 3))) {
    lua_pushnil(L);
    lua_pushstring(L, strerror(errno));
    return 2;
  }
  lua_pushboolean(L, 1);
  return 1;
}

static int next_signal(lua_State *L) {
  int number = mrn_signal_next();
  if (number == 0) return 0;
  lua_pushstring(L, mrn_signal_name(number));
  return 1;
}

void mrn_bind_poll(lua_State *L) {
  static const luaL_Reg methods[] = {{"set", poller_set},
                                     {"wait", poller_wait},
                                     {"next", poller_next},
                                     {"close", poller_close},
                                     {"__gc", poller_close},
                                     {"__close", poller_close},
                                     {NULL, NULL}};
  static const luaL_Reg functions[] = {
      {"poller", new_poller}, {"signal", watch_signal}, {"next_signal", next_signal}, {NULL, NULL}};
  mr_new_type(L, MRN_POLLER_TYPE, methods);
  luaL_setfuncs(L, functions, 0);
}
