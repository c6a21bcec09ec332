/* Processes of our own, and datagrams to the system's manager. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lua/net_bind.h"
#include "net/process.h"
#include "net/signals.h"
#include "net/stream.h"

static int failure(lua_State *L) {
  lua_pushnil(L);
  lua_pushstring(L, strerror(errno));
  return 2;
}

static int own_pid(lua_State *L) {
  lua_pushinteger(L, (lua_Integer)getpid());
  return 1;
}

/* Pushes the words and an array of them. */
static const char **check_words(lua_State *L) {
  luaL_checktype(L, 1, LUA_TTABLE);
  size_t count = lua_rawlen(L, 1);
  luaL_argcheck(L, count > 0 && count < 4096, 1, "a program and its arguments expected");
  const char **argv = lua_newuserdata(L, (count + 1) * sizeof *argv);
  luaL_checkstack(L, (int)count + 4, "too many arguments");
  for (size_t i = 0; i < count; i++) {
    lua_rawgeti(L, 1, (int)i + 1);
    luaL_argcheck(L, lua_type(L, -1) == LUA_TSTRING, 1, "only strings expected");
    argv[i] = mrn_check_text(L, lua_gettop(L)); /* it stays on the stack */
  }
  argv[count] = NULL;
  return argv;
}

static int spawn(lua_State *L) {
  bool with_line = lua_toboolean(L, 2);
  int line = -1;
  lua_settop(L, 1);
  const char **argv = check_words(L);
  mrn_stream *stream = with_line ? mrn_push_stream(L) : NULL;
  pid_t pid = mrn_spawn((char *const *)argv, with_line ? &line : NULL);
  if (pid < 0) return failure(L);
  if (stream != NULL) mrn_stream_adopt(stream, line);
  lua_pushinteger(L, (lua_Integer)pid);
  if (stream == NULL) return 1;
  lua_insert(L, -2);
  return 2;
}

static int parent(lua_State *L) {
  mrn_stream *stream = mrn_push_stream(L);
  int fd = mrn_parent();
  if (fd < 0) return failure(L);
  mrn_stream_adopt(stream, fd);
  return 1;
}

static pid_t check_pid(lua_State *L) {
  lua_Integer pid = luaL_checkinteger(L, 1);
  luaL_argcheck(L, pid > 0, 1, "the number of a process expected"); /* others mean groups of them */
  return (pid_t)pid;
}

static int wait_for(lua_State *L) {
  int status, ended = mrn_wait(check_pid(L), &status);
  if (ended < 0) return failure(L);
  if (ended == 0) return 0;
  lua_pushinteger(L, WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
  return 1;
}

static int send_signal(lua_State *L) {
  pid_t pid = check_pid(L);
  const char *name = luaL_checkstring(L, 2);
  int number = strcmp(name, "KILL") == 0 ? SIGKILL : mrn_signal_number(name);
  luaL_argcheck(L, number != 0, 2, "unknown signal");
  if (kill(pid, number) != 0) return failure(L);
  lua_pushboolean(L, 1);
  return 1;
}

static int datagram(lua_State *L) {
  const char *path = mrn_check_text(L, 1);
  size_t length;
  const char *bytes = luaL_checklstring(L, 2, &length);
  if (!mrn_datagram(path, bytes, length)) return failure(L);
  lua_pushboolean(L, 1);
  return 1;
}

void mrn_bind_process(lua_State *L) {
  static const luaL_Reg functions[] = {
      {"pid", own_pid},      {"spawn", spawn},       {"parent", parent}, {"wait", wait_for},
      {"kill", send_signal}, {"datagram", datagram}, {NULL, NULL}};
  luaL_setfuncs(L, functions, 0);
}
