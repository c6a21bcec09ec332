--- Connections to one Redis, shared by many tasks: each command has one for itself, the others wait in line.
--
-- The protocol is redis-lua's, over a socket of the runtime. In nginx it is lua-resty-redis, whose connections belong
-- to the request or timer that uses them, and are kept in nginx's own pool.
-- @module moonrabbit.app.dedupe.redis_clients

local errors = require "moonrabbit.errors"
local protect = require "moonrabbit.protect"

---@class moonrabbit.dedupe.RedisClients
local Clients = {}
Clients.__index = Clients

local function failed(server, kind, message, temporary)
  return errors.new { kind = kind, message = "Redis: " .. message, endpoint = server.label, temporary = temporary }
end

-- What Redis answers with when it will be able to do later what it cannot do now.
local passing = { LOADING = true, BUSY = true, OOM = true, READONLY = true, MASTERDOWN = true, TRYAGAIN = true,
  CLUSTERDOWN = true, MISCONF = true }
local about_the_login = { NOAUTH = true, WRONGPASS = true, NOPERM = true }

-- Redis said no. It never repeats what it was sent.
local function refused(server, said)
  local word = said:match "^(%u+)"
  if about_the_login[word] or said:find "AUTH" then return failed(server, "auth", said, false) end
  return failed(server, "protocol", said, passing[word] or false)
end

local function password_of(server)
  if type(server.password) ~= "function" then return server.password end
  local password, why = server.password()
  if type(password) == "string" then return password end
  error("redis error: NOAUTH " .. (why and tostring(why) or "the password function gave no password"), 0)
end

-- ---- redis-lua ------------------------------------------------------------------------------------------

local function library()
  local ok, found = pcall(require, "redis")
  if ok then return found end
  error("dedupe.redis needs redis-lua (Debian: lua-redis; else: luarocks install redis-lua): "
    .. tostring(found):match "^[^\n]*", 0)
end

local function log_in(server, client)
  local password = password_of(server)
  if password then
    if server.user then client:auth(server.user, password) else client:auth(password) end
  end
  if server.database > 0 then client:select(tostring(server.database)) end
end

local function open(self, connection)
  local server, socket = self.server, connection.socket
  if server.path then
    local transport, kind, text, temporary = self.runtime.open({ path = server.path }, nil, server.timeout)
    if not transport then return nil, failed(server, kind, text or kind, temporary) end
    socket.transport = transport
  elseif not socket:connect(server.host, server.port) then
    return nil, failed(server, socket.failure.kind, socket.failure.message, socket.failure.temporary)
  end
  connection.client = library().connect { socket = socket }
  log_in(server, connection.client)
  return true
end

-- One command on one connection; runs protected.
local function exchange(self, connection, command, ...)
  if not connection.client then
    local ok, err = open(self, connection)
    if not ok then return false, err end
  end
  return true, connection.client[command](connection.client, ...)
end

local function explain(server, socket, thrown)
  local failure = socket.failure
  if failure then return failed(server, failure.kind, failure.message, failure.temporary) end
  local text = tostring(thrown)
  local said = text:match "redis error: (.*)$"
  if said then return refused(server, said) end
  return failed(server, "closed", (text:gsub("^.-:%d+: ", "")), true)
end

local function take(self)
  local idle = self.idle
  while #idle == 0 and self.open >= self.most do
    if not self.freed:wait(self.server.timeout) then
      return nil, failed(self.server, "timeout", ("no connection was free within %g s"):format(self.server.timeout))
    end
  end
  local connection = table.remove(idle)
  if connection then return connection end
  self.open = self.open + 1
  return { socket = require("moonrabbit.runtime.socket").new {
    runtime = self.runtime, tls = self.server.tls, timeout = self.server.timeout } }
end

local function give_back(self, connection, usable)
  if usable and not self.closed then
    table.insert(self.idle, connection)
  else
    self.open = self.open - 1
    connection.socket:close()
  end
  self.freed:signal()
end

local function by_redis_lua(self, command, ...)
  local connection, busy = take(self)
  if not connection then return false, busy end
  local socket, reused = connection.socket, connection.client ~= nil
  socket.deadline, socket.failure = self.runtime.now() + self.server.timeout, nil
  local whole, ok, result = protect(exchange, self, connection, command, ...)
  if whole and ok then
    give_back(self, connection, true)
    return true, result
  end
  local said_no = not whole and connection.client and tostring(ok):find("redis error: ", 1, true) ~= nil
  give_back(self, connection, said_no and reused)
  if whole then return false, result end
  if ok == self.runtime.cancelled and ok ~= nil then error(ok, 0) end
  local err = explain(self.server, socket, ok)
  -- A connection that lay idle may have been closed by Redis meanwhile (`timeout`, a restart): that is no failure yet.
  return false, err, reused and not said_no and err.kind == "closed"
end

-- ---- lua-resty-redis -------------------------------------------------------------------------------------

local POOL_SECONDS = 60

local function resty_library()
  for _, name in ipairs { "resty.redis", "nginx.redis" } do
    local ok, found = pcall(require, name)
    if ok then return found end
  end
  error("dedupe.redis needs lua-resty-redis in nginx (Debian: lua-nginx-redis, part of OpenResty)", 0)
end

local function resty_open(self)
  local server, client = self.server, resty_library():new()
  client:set_timeout(server.timeout * 1000)
  local options = { pool_size = self.most, pool = ("moonrabbit:%s:%d:%s"):format(server.label, server.database,
    server.user or "") }
  if server.tls then
    options.ssl, options.ssl_verify = true, server.tls.verify ~= false
    options.server_name = server.tls.server_name
  end
  local ok, why
  if server.path then
    ok, why = client:connect("unix:" .. server.path, options)
  else
    ok, why = client:connect(server.host, server.port, options)
  end
  if not ok then return nil, failed(server, why == "timeout" and "timeout" or "refused", tostring(why), true) end
  if client:get_reused_times() > 0 then return client end
  local password = password_of(server)
  if password then
    if server.user then ok, why = client:auth(server.user, password) else ok, why = client:auth(password) end
    if not ok then return nil, refused(server, tostring(why)) end
  end
  if server.database > 0 then
    ok, why = client:select(server.database)
    if not ok then return nil, refused(server, tostring(why)) end
  end
  return client
end

local function by_resty_redis(self, command, ...)
  local client, err = resty_open(self)
  if not client then return false, err end
  local reply, why = client[command](client, ...)
  if reply == nil then
    client:close()
    return false, failed(self.server, why == "timeout" and "timeout" or "closed", tostring(why), true)
  end
  client:set_keepalive(POOL_SECONDS * 1000, self.most)
  if reply == false then return false, refused(self.server, tostring(why)) end
  if reply == rawget(_G, "ngx").null then reply = nil end
  return true, reply
end

-- ---- For both ----------------------------------------------------------------------------------------

--- Sends a command and waits for its reply: true and the reply (nil is a nil of Redis), or false, err.
---@param command string in small letters
---@param ... string
---@return boolean ok
---@return any reply
function Clients:command(command, ...)
  local ok, result, again
  repeat ok, result, again = self.send(self, command, ...) until ok or not again
  return ok, result
end

--- Closes what is idle now, and the rest when it comes back.
function Clients:close()
  self.closed = true
  for _, connection in ipairs(self.idle) do connection.socket:close() end
  self.idle, self.open = {}, self.open - #self.idle
end

local M = {}

---@param server table host, port, path, user, password, database, tls, timeout, label
---@param runtime table
---@param most integer connections at once
---@return moonrabbit.dedupe.RedisClients
function M.new(server, runtime, most)
  if runtime.name ~= "resty" then library() end -- a missing one is told at once
  return setmetatable({
    server = server, runtime = runtime, most = most, idle = {}, open = 0, freed = runtime.condition(),
    send = runtime.name == "resty" and by_resty_redis or by_redis_lua,
  }, Clients)
end

return M
