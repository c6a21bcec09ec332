--- The handlers of a consumer, in tasks that are used again from message to message, the workers.
--
-- A worker takes messages until there are none and then waits. As one takes a message and sees more,
-- it gets the next worker going: at most one a turn, so that handlers that never yield cost nothing.
-- @module moonrabbit.consumer

local core = require "moonrabbit.core"
local described = require "moonrabbit.described"
local yielding_pcall = require "moonrabbit.protect"
local taking = require "moonrabbit.consumer.taking"
local turner = require "moonrabbit.consumer.turner"

local take = taking._take

---@class moonrabbit.Consumer
local Consumer = {}

-- What its handler has not settled goes back, after a while: at once it would come back at once.
local function give_back(self, message)
  if self.no_ack then return end
  local delay = self._error_delay
  local function settle()
    if delay > 0 then self._runtime.sleep(delay) end
    if core.settle(message, "nack", true) ~= nil then self._session:touch() end
  end
  if delay > 0 then self._runtime.spawn(settle) else settle() end
end

local function report(self, message, trace)
  self.connection:_report("error", "a handler of the consumer on '" .. self.queue .. "' threw: " .. trace, message)
  give_back(self, message)
end

-- Handles messages until the queue is empty. state.message is the one being handled.
local function work(self, state)
  local pop, handler, turn = self._pop, self._handler, state.turn
  local message = take(self)
  local queue = self._deliveries
  local countdown = 1
  while message do
    if not self._waking and queue:count() > 0 then self:_wake_worker() end
    state.message = message
    handler(message)
    state.message = nil
    countdown = countdown - 1
    if countdown == 0 then countdown = turn() end
    message = pop(queue)
    if not message then
      message = take(self)
      queue = self._deliveries
    end
  end
end

local function traceback(err)
  if type(err) == "table" or type(err) == "userdata" then
    local meta = getmetatable(err)
    if not (meta and meta.__tostring) then return debug.traceback("(error object is a " .. type(err) .. ")", 2) end
  end
  return debug.traceback(described(err), 2)
end

-- A worker whose task is cancelled is over, and another one takes its place.
local function leave(self)
  self._workers = self._workers - 1
  if self:buffered() > 0 then self:_wake_worker() end
  if self._drained then self._drained:broadcast() end
  self:_let_go()
end

local function worker(self, protect)
  local state = { turn = turner(self._runtime) }
  local current = self._runtime.current
  local me = current and current()
  if me then self._tasks[me] = true end
  local cancelled = self._runtime.cancelled
  self._waking = false
  while true do
    local ok, trace = protect(work, self, state)
    if not ok then
      local message = state.message
      state.message = nil
      if trace == cancelled and cancelled ~= nil then
        if message then give_back(self, message) end
        return leave(self)
      end
      if message then report(self, message, trace) else self.connection:_report("error", trace) end
    elseif self._ended and self:buffered() == 0 then
      break
    else
      self._idle = self._idle + 1
      self._session:drain()
      local whole, err = yielding_pcall(self._ready.wait, self._ready)
      self._idle = self._idle - 1
      self._waking = false
      if not whole then -- by its handler perhaps
        leave(self)
        error(err, 0)
      end
    end
  end
  self._workers = self._workers - 1
  if me then self._tasks[me] = nil end
  if self._drained then self._drained:broadcast() end
  self:_let_go()
end

-- xpcall of (f, a, b) that keeps a traceback and lets f yield. PUC Lua 5.1 has no such thing: there
-- the traceback is missing its inner half.
local function protector(runtime)
  local cancelled = runtime.cancelled
  local function handle(err)
    if cancelled ~= nil and err == cancelled then return err end
    return traceback(err)
  end
  if yielding_pcall ~= pcall then
    return function(f, a, b)
      local ok, err = yielding_pcall(f, a, b)
      if ok then return true end
      if err == cancelled then return false, err end
      return false, type(err) == "string" and err or traceback(err)
    end
  end
  return function(f, a, b) return xpcall(f, handle, a, b) end
end

---@package
function Consumer:_wake_worker()
  if self._waking then return end
  if self._idle > 0 then
    self._waking = true
    self._ready:signal()
  elseif self._workers < self.concurrency then
    self._protect = self._protect or protector(self._runtime)
    self._runtime.spawn(worker, self, self._protect) -- begins with the next turn
    self._waking = true
    self._workers = self._workers + 1
  end
end

return Consumer
