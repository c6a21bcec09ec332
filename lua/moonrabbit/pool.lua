--- Pool: connections and channels shared by many tasks.
--
-- A channel belongs to one task between `acquire` and `release`. Channels are opened when they are
-- needed, at most `channels` on each of at most `connections`; who finds all taken waits. What was
-- closed meanwhile is never handed out: it is replaced, connections too. A channel that comes back with
-- a transaction, consumers, unsettled deliveries or unconfirmed publishes is closed instead of being used
-- again.
-- @module moonrabbit.pool

local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"
local runtimes = require "moonrabbit.runtime"
local Connection = require "moonrabbit.connection"
local pcall = require "moonrabbit.protect"

local huge = math.huge

---@class moonrabbit.PoolOptions
---@field connect string|moonrabbit.ConnectOptions  what to connect to, as for moonrabbit.connect
---@field connections integer?  at most so many; 1 by default
---@field channels integer?     at most so many on each connection; 16 by default
---@field confirm boolean?      its channels confirm publishes; true by default
---@field prefetch integer?     of its channels, as in Channel:qos
---@field timeout number?       seconds to wait for a channel; 30 by default

---@class moonrabbit.Pool
local Pool = {}
Pool.__index = Pool
Pool.__name = "moonrabbit.Pool"

local pool_options = {
  connect = options.either(options.string, options.table),
  connections = options.integer(1, 65535),
  channels = options.integer(1, 65535),
  confirm = options.boolean,
  prefetch = options.integer(0, 65535),
  timeout = options.seconds,
}

--- Makes a pool; used by moonrabbit.pool.
---@package
---@param opts string|moonrabbit.PoolOptions a URI stands for { connect = URI }
---@param level integer?
---@return moonrabbit.Pool
function Pool.new(opts, level)
  level = (level or 1) + 1
  if type(opts) == "string" then opts = { connect = opts } end
  if type(opts) ~= "table" then error("pool: a URI or a table of options expected", level) end
  options.check("pool", opts, pool_options, level)
  local connect = opts.connect or {}
  if type(connect) == "string" then connect = { uri = connect } end
  options.check("pool: connect", connect, Connection.options, level)
  if connect.reconnect == nil then
    -- The pool itself replaces a connection that is lost.
    local given = connect
    connect = { reconnect = false }
    for key, value in pairs(given) do connect[key] = value end
  end
  local confirm = opts.confirm
  if confirm == nil then confirm = true end
  local runtime = runtimes.find(connect.runtime, level)
  return setmetatable({
    _connect = connect, _runtime = runtime,
    _max_connections = opts.connections or 1, _max_channels = opts.channels or 16,
    _channel = { confirm = confirm, prefetch = opts.prefetch },
    _timeout = opts.timeout or 30,
    _members = {},      -- { connection, idle = {channels}, used = n, opening = boolean }
    _of = {},           -- channel -> member, while it is out
    _freed = runtime.condition(),
    _closed = false,
  }, Pool)
end

-- Drops members whose connection is gone.
local function sweep(self)
  for i = #self._members, 1, -1 do
    local member = self._members[i]
    if member.connection and not member.connection:is_open() then table.remove(self._members, i) end
  end
end

local function idle_channel(self)
  for _, member in ipairs(self._members) do
    local idle = member.idle
    while #idle > 0 do
      local channel = table.remove(idle)
      if channel:is_open() then return channel, member end
      member.used = member.used - 1
    end
  end
end

-- The open connection with the fewest channels, if it may have one more.
local function roomiest(self)
  local best
  for _, member in ipairs(self._members) do
    if member.connection and member.used < self._max_channels and (not best or member.used < best.used) then
      best = member
    end
  end
  return best
end

--- Takes a channel, waiting until there is one. Pool:with gives it back by itself.
--- err.kind: `timeout` when none became free; `closed` when the pool is; else why it could not connect.
---@param timeout number? seconds; the pool's by default
---@return moonrabbit.Channel|nil, moonrabbit.Error?
function Pool:acquire(timeout)
  if timeout ~= nil then options.argument("Pool:acquire", "timeout", timeout, options.seconds) end
  timeout = timeout or self._timeout
  local now = self._runtime.now
  local deadline = now() + timeout
  while true do
    if self._closed then
      return nil, errors.new { kind = "closed", message = "the pool is closed", temporary = false }
    end
    sweep(self)
    local channel, member = idle_channel(self)
    if channel then
      self._of[channel] = member
      return channel
    end
    member = roomiest(self)
    -- A new connection as long as there may be one and the others are busy.
    if #self._members < self._max_connections and (not member or member.used > 0) then
      local new = { idle = {}, used = 0 }
      self._members[#self._members + 1] = new
      local whole, connection, err = pcall(Connection.connect, self._connect, 2, deadline)
      if not whole or not connection or self._closed then
        for i, m in ipairs(self._members) do
          if m == new then table.remove(self._members, i) break end
        end
        self._freed:signal()
        if not whole then error(connection, 0) end
        if not connection then return nil, err end
        connection:close(math.max(0, deadline - now()))
      else
        new.connection = connection
        member = new
        self._freed:broadcast() -- it has room for others too
      end
    end
    if member and member.connection then
      member.used = member.used + 1
      local connection = member.connection
      local opts = { confirm = self._channel.confirm, prefetch = self._channel.prefetch,
        timeout = math.max(0, deadline - now()) }
      local whole, err
      whole, channel, err = pcall(connection.channel, connection, opts)
      if whole and channel then
        channel.timeout = connection.timeout
        self._of[channel] = member
        return channel
      end
      member.used = member.used - 1
      self._freed:signal()
      if not whole then error(channel, 0) end
      if connection:is_open() then return nil, err end
      if now() >= deadline then return nil, err end
    elseif not self._closed then
      local left = deadline - now()
      if left <= 0 then
        return nil, errors.new {
          kind = "timeout", message = ("no channel of the pool became free within %g s"):format(timeout),
        }
      end
      self._freed:wait(left < huge and left or nil)
    end
  end
end

-- Whether the next one would find it as a fresh one is.
local function clean(self, channel)
  return channel._prefetch == self._channel.prefetch and not channel._prefetch_global
    and (channel._told or 0) == (self._channel.prefetch or 0) and channel.timeout == channel.connection.timeout
    and channel:is_open() and channel.connection:is_open() and not channel._tx and next(channel._consumers) == nil
    and channel:unsettled() == 0 and channel:unconfirmed() == 0
end

--- Gives a channel back. It throws when the channel is not one that is out of this pool.
---@param channel moonrabbit.Channel
function Pool:release(channel)
  local member = self._of[channel]
  if not member then error("Pool:release: the channel is not one that is out of this pool", 2) end
  self._of[channel] = nil
  if clean(self, channel) and not self._closed then
    channel._listeners, channel._failures = nil, {}
    member.idle[#member.idle + 1] = channel
  else
    member.used = member.used - 1
    channel:_abandon()
  end
  self._freed:signal()
end

--- Takes a channel, calls `fn(channel, ...)` and gives the channel back, also when fn throws.
---@param fn fun(channel: moonrabbit.Channel, ...): ...
---@param ... any further arguments of fn
---@return ... what fn returned; or nil, err when there was no channel
function Pool:with(fn, ...)
  options.argument("Pool:with", "fn", fn, options.callback)
  local channel, err = self:acquire()
  if not channel then return nil, err end
  local function finish(ok, ...)
    self:release(channel)
    if not ok then error((...), 0) end
    return ...
  end
  return finish(pcall(fn, channel, ...))
end

--- How many connections and channels there are, and how many channels are out.
---@return { connections: integer, channels: integer, used: integer }
function Pool:stats()
  local stats = { connections = 0, channels = 0, used = 0 }
  for _, member in ipairs(self._members) do
    if member.connection then
      stats.connections = stats.connections + 1
      stats.channels = stats.channels + member.used
      stats.used = stats.used + member.used - #member.idle
    end
  end
  return stats
end

--- Closes every connection; who waits for a channel gets an error.
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Pool:close(timeout)
  if timeout ~= nil then options.argument("Pool:close", "timeout", timeout, options.seconds) end
  self._closed = true
  self._freed:broadcast()
  local members = self._members
  self._members = {}
  local now = self._runtime.now
  local deadline = now() + (timeout or self._connect.timeout or 30)
  local failed
  for _, member in ipairs(members) do
    if member.connection then member.connection._session:start_close() end
  end
  for _, member in ipairs(members) do
    if member.connection then
      local ok, err = member.connection:close(math.max(0, deadline - now()))
      if not ok then failed = err end
    end
  end
  if failed then return nil, failed end
  return true
end

function Pool:__tostring()
  local stats = self:stats()
  return ("%s (%d connections, %d channels, %d in use)"):format(Pool.__name, stats.connections, stats.channels,
    stats.used)
end

return Pool
