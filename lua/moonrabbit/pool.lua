--- Pool: connections and channels shared by many tasks.
--
-- A channel belongs to one task between `acquire` and `release`. Channels are opened when they are
-- needed, at most `channels` on each of at most `connections`; who finds all taken waits, and is served in
-- the order of coming. What was closed meanwhile is never handed out: it is replaced, connections too, in the
-- background and with growing pauses as long as somebody waits. So an outage costs those who wait no more than
-- the time it lasts; whoever has a channel of a lost connection gets `closed` and gives it back. A channel that comes
-- back with a transaction, consumers, unsettled deliveries or unconfirmed publishes is closed instead of being used
-- again.
--
-- Publishers need no pool: one moonrabbit.publisher may be used by any number of tasks at once.
-- @module moonrabbit.pool

local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"
local runtimes = require "moonrabbit.runtime"
local Connection = require "moonrabbit.connection"
local pcall = require "moonrabbit.protect"

-- Pauses between attempts to connect, while somebody waits for it.
local FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2

---@class moonrabbit.PoolOptions
---@field connect string|moonrabbit.ConnectOptions  what to connect to, as for moonrabbit.connect; but for `reconnect`: what is lost the pool replaces by itself
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
  -- The pool itself replaces a connection that is lost.
  local given = connect
  connect = {}
  for key, value in pairs(given) do connect[key] = value end
  connect.reconnect = false
  local confirm = opts.confirm
  if confirm == nil then confirm = true end
  local runtime = runtimes.find(connect.runtime, level)
  return setmetatable({
    _connect = connect, _runtime = runtime,
    _max_connections = opts.connections or 1, _max_channels = opts.channels or 16,
    _channel = { confirm = confirm, prefetch = opts.prefetch },
    _timeout = opts.timeout or 30,
    _heritage = {},     -- which nodes failed, and since when a site is away: what each connection knows of those before it
    _members = {},      -- { connection (nil while it is being made), idle = {channels}, used = n, with those being opened }
    _of = {},           -- channel -> member, while it is out
    _line = {},         -- who waits, first come first: { condition, channel or err or thrown once served }
    _growing = 0,       -- channels being opened for those who wait
    _pause = FIRST_PAUSE,
    _connected = false, -- whether it has ever been
    _closed = false,
  }, Pool)
end

local function closed_error()
  return errors.new { kind = "closed", message = "the pool is closed", temporary = false }
end

-- ---- The line -----------------------------------------------------------------------------------------

-- Serves whoever has waited longest; false: nobody waits.
local function serve(self, answer)
  local waiter = table.remove(self._line, 1)
  if not waiter then return false end
  for key, value in pairs(answer) do waiter[key] = value end
  waiter.served = true
  waiter.condition:signal()
  return true
end

local function serve_all(self, answer)
  while serve(self, answer) do end -- luacheck: ignore 542
end

-- A channel is free.
local function free(self, member, channel)
  self._of[channel] = nil
  if #self._line > 0 then
    self._of[channel] = member
    serve(self, { channel = channel })
  else
    member.idle[#member.idle + 1] = channel
  end
end

-- ---- Growing ------------------------------------------------------------------------------------------

local function drop_member(self, member)
  for i, each in ipairs(self._members) do
    if each == member then return table.remove(self._members, i) end
  end
end

-- Drops members whose connection is gone.
local function sweep(self)
  for i = #self._members, 1, -1 do
    local member = self._members[i]
    if member.connection and not member.connection:is_open() then table.remove(self._members, i) end
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

-- Where the next channel is to be opened: a member, with a place taken; nil: nowhere.
local function place(self)
  sweep(self)
  local member = roomiest(self)
  -- A new connection as long as there may be one and the others are busy.
  if #self._members < self._max_connections and (not member or member.used > 0) then
    member = { idle = {}, used = 0 }
    self._members[#self._members + 1] = member
  end
  if member then member.used = member.used + 1 end
  return member
end

local grow

-- As many channels are being opened as there are tasks that wait, where there is a place for them.
local function keep_up(self)
  while not self._closed and not self._pausing and self._growing < #self._line do
    local member = place(self)
    if not member then return end
    self._growing = self._growing + 1
    self._runtime.spawn(grow, self, member)
  end
end

-- It did not work: for good, or for now. A pool that has never been connected fails at once, as moonrabbit.connect.
local function failed(self, err)
  self._last = err
  if not err.temporary or not self._connected then
    serve_all(self, { err = err })
  elseif #self._line > 0 and not self._pausing then
    self._pausing = true
    self._runtime.spawn(function()
      self._runtime.sleep(self._pause)
      self._pause = math.min(LONGEST_PAUSE, 2 * self._pause)
      self._pausing = false
      keep_up(self)
    end)
  end
end

-- Connects; whether it did.
local function connect(self, member)
  local whole, connection, err = pcall(Connection.connect, self._connect, 2, self._heritage)
  if not whole then -- a URI that is none, say: the caller's mistake
    drop_member(self, member)
    serve(self, { thrown = connection })
    return false
  end
  if not connection or self._closed then
    drop_member(self, member)
    if connection then connection:close() else failed(self, err) end
    return false
  end
  member.connection = connection
  self._connected, self._pause, self._last = true, FIRST_PAUSE, nil
  connection:on("closed", function() keep_up(self) end) -- who waits for its channels gets another's
  keep_up(self)
  return true
end

local function open_channel(self, member)
  local connection = member.connection
  local whole, channel, err = pcall(connection.channel, connection, {
    confirm = self._channel.confirm, prefetch = self._channel.prefetch, timeout = connection.call_timeout,
  })
  if whole and channel then
    if self._closed then return end
    free(self, member, channel)
    return
  end
  member.used = member.used - 1
  if not whole then
    serve(self, { thrown = channel })
  elseif connection:is_open() then
    serve(self, { err = err })
  else
    failed(self, err)
  end
end

function grow(self, member)
  if member.connection or connect(self, member) then open_channel(self, member) end
  self._growing = self._growing - 1
  keep_up(self)
end

-- ---- Lending ------------------------------------------------------------------------------------------

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

local function leave(self, waiter)
  for i, each in ipairs(self._line) do
    if each == waiter then return table.remove(self._line, i) end
  end
end

local function stand_in_line(self, waiter, deadline)
  local now = self._runtime.now
  while not waiter.served do
    local left = deadline - now()
    if left <= 0 then return end
    waiter.condition:wait(left < math.huge and left or nil)
  end
end

local function wait_in_line(self, timeout)
  local waiter = { condition = self._runtime.condition() }
  self._line[#self._line + 1] = waiter
  keep_up(self)
  local whole, cancelled = pcall(stand_in_line, self, waiter, self._runtime.now() + timeout)
  if not waiter.served then leave(self, waiter) end
  if not whole then
    if waiter.channel then free(self, self._of[waiter.channel], waiter.channel) end
    error(cancelled, 0)
  end
  return waiter
end

--- Takes a channel, waiting until there is one: those who wait are served in the order of coming. Pool:with
--- gives it back by itself.
--- err.kind: `timeout` when none became free; `closed` when the pool is; else why it could not connect: at once
--- the first time, and where trying again cannot help (err.temporary); after the timeout when the broker was there before.
---@param timeout number? seconds; the pool's by default
---@return moonrabbit.Channel|nil, moonrabbit.Error?
function Pool:acquire(timeout)
  if timeout ~= nil then options.argument("Pool:acquire", "timeout", timeout, options.seconds) end
  timeout = timeout or self._timeout
  if self._closed then return nil, closed_error() end
  sweep(self)
  if #self._line == 0 then
    local channel, member = idle_channel(self)
    if channel then
      self._of[channel] = member
      return channel
    end
  end
  local waiter = wait_in_line(self, timeout)
  if waiter.thrown then error(waiter.thrown, 0) end
  if waiter.channel then return waiter.channel end
  if waiter.err then return nil, waiter.err end
  return nil, self._last or errors.new {
    kind = "timeout", message = ("no channel of the pool became free within %g s"):format(timeout),
  }
end

-- Whether the next one would find it as a fresh one is.
local function clean(self, channel)
  return channel._prefetch == self._channel.prefetch and not channel._prefetch_global
    and (channel._told or 0) == (self._channel.prefetch or 0) and channel.timeout == channel.connection.call_timeout
    and channel:is_open() and channel.connection:is_open() and not channel._tx and next(channel._consumers) == nil
    and channel:unsettled() == 0 and channel:unconfirmed() == 0
end

--- Gives a channel back. It throws when the channel is not one that is out of this pool.
---@param channel moonrabbit.Channel
function Pool:release(channel)
  local member = self._of[channel]
  if not member then error("Pool:release: the channel is not one that is out of this pool", 2) end
  if clean(self, channel) and not self._closed then
    channel._listeners, channel._failures = nil, {}
    free(self, member, channel)
  else
    self._of[channel] = nil
    member.used = member.used - 1
    channel:_abandon()
    keep_up(self)
  end
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
---@return { connections: integer, channels: integer, used: integer, waiting: integer }
function Pool:stats()
  sweep(self)
  local stats = { connections = 0, channels = 0, used = 0, waiting = #self._line }
  for _, member in ipairs(self._members) do
    if member.connection then
      stats.connections = stats.connections + 1
      stats.channels = stats.channels + #member.idle
    end
  end
  for _, member in pairs(self._of) do
    if member.connection then stats.channels, stats.used = stats.channels + 1, stats.used + 1 end
  end
  return stats
end

--- Closes every connection; who waits for a channel gets an error.
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Pool:close(timeout)
  if timeout ~= nil then options.argument("Pool:close", "timeout", timeout, options.seconds) end
  self._closed = true
  serve_all(self, { err = closed_error() })
  local members = self._members
  self._members = {}
  local now = self._runtime.now
  local deadline = now() + (timeout or self._connect.timeout or 30)
  local problem
  for _, member in ipairs(members) do
    if member.connection then member.connection._session:start_close() end
  end
  for _, member in ipairs(members) do
    if member.connection then
      local ok, err = member.connection:close(math.max(0, deadline - now()))
      if not ok then problem = err end
    end
  end
  if problem then return nil, problem end
  return true
end

function Pool:__tostring()
  local stats = self:stats()
  return ("%s (%d connections, %d channels, %d in use)"):format(Pool.__name, stats.connections, stats.channels,
    stats.used)
end

return Pool
