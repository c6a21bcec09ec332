--- One connection to one broker, from connect to close: the engine, its transport and its tasks.
--
-- A session ends for good; a Connection may outlive it. Its tasks:
--
-- * the reader waits for bytes and pumps the engine's events;
-- * the writer sends what there is, once a turn of the loop, and keeps the engine's deadlines;
-- * the watch keeps the deadlines while the writer waits for a full socket.
--
-- Nothing that `pump` calls may yield: what may (the user's functions) runs in tasks.
-- Users meet `moonrabbit.connection`, not this.
-- @module moonrabbit.session

local core = require "moonrabbit.core"
local errors = require "moonrabbit.errors"
local protect = require "moonrabbit.protect"

---@class moonrabbit.Session
---@field engine moonrabbit.core.Engine
---@field transport table
---@field runtime table
---@field state "connecting"|"open"|"closing"|"closed"
---@field reason moonrabbit.Error?   why it closed
---@field endpoint string
---@field dirty boolean              the writer is going to run
---@field channels table             Channel objects that are open, as keys
---@field health moonrabbit.HealthOptions?        what the broker's silence is judged by, beside the core
---@field detector moonrabbit.health.Detector?    which does so
local Session = {}
Session.__index = Session

local max, min, huge = math.max, math.min, math.huge

-- After a write failed, what the broker said before is still read, for so long.
local LAST_WORDS = 1
-- So much is read past what a full consumer may hold, for those who wait for an answer behind it.
local MOST_ADMITTED = 64 * 1024 * 1024
-- Passwords that are remembered, to keep them out of errors.
local MOST_SECRETS = 4
-- Seconds between two looks at a peer that takes nothing, at least.
local SHORTEST_LOOK = 0.01
-- What is left to write when a session ends has so long to leave.
local LAST_FLUSH = 2

-- ---- Calls: what waits for a reply. The broker answers in order, so each channel has a queue. --------

---@class moonrabbit.Calls
local Calls = {}
Calls.__index = Calls

function Calls.new()
  return setmetatable({ first = 1, last = 0 }, Calls)
end

function Calls:push(call)
  self.last = self.last + 1
  self[self.last] = call
end

--- The oldest call, or the oldest of a method. The broker answers in order, but for basic.consume,
--- whose answer comes from the queue and may be overtaken.
function Calls:pop(what)
  local first = self.first
  if what and self[first] and self[first].what ~= what then return self:extract(what) end
  local call = self[first]
  if call then
    self[first] = nil
    if first == self.last then
      self.first, self.last = 1, 0
    else
      self.first = first + 1
    end
  end
  return call
end

function Calls:extract(what)
  for i = self.first + 1, self.last do
    local call = self[i]
    if call.what == what then
      for j = i, self.last do self[j] = self[j + 1] end
      self.last = self.last - 1
      return call
    end
  end
end

-- Ends a call. One that nobody waits for any more may want to undo what it did.
local function resolve(call, ok, result, extra)
  call.done = true
  if call.abandoned then
    if ok and call.late then call.late(result, extra) end
    return
  end
  call.ok, call.result, call.extra = ok, result, extra
  call.condition:signal()
end

function Calls:fail(err)
  local call = self:pop()
  while call do
    resolve(call, false, err)
    call = self:pop()
  end
end

-- ---- Waiting ----------------------------------------------------------------------------------------

--- Whether listeners have so much to take that nothing more is to be read. A handshake and a goodbye go on.
---@return boolean
function Session:is_overfull()
  return self.state == "open" and self.overfull()
end

--- Counts what is read past a consumer or listener that has more than it takes.
function Session:count_read(n)
  self.admitted = (self.engine:is_full() or self:is_overfull()) and self.admitted + n or 0
end

--- Reads once where the transport lets a caller without a loop do so; false: it does not, or not now.
---@param deadline number
---@return boolean
function Session:read_alone(deadline)
  local transport = self.transport
  if not transport.fill_alone or self.state == "closed" or self:is_overfull() then return false end
  local n, kind, text = transport:fill_alone(self.engine, deadline)
  if n then
    self:count_read(n)
  elseif kind == nil or kind == "again" or kind == "full" then
    return false
  else
    self.engine:eof(text or kind)
  end
  self:pump()
  return true
end

--- Waits on a condition for something that only reading can bring.
function Session:block(condition, left)
  if self:read_alone(self.runtime.now() + left) then return end
  self.awaiting = self.awaiting + 1
  local check_owner = self.transport.check_owner
  if check_owner then check_owner(self.transport) end
  local until_then = self.runtime.now() + left
  if until_then > self.awaiting_until then self.awaiting_until = until_then end
  if self.paused and self.admitted < MOST_ADMITTED then self.drained:signal() end
  condition:wait(left < huge and left or nil)
  self.awaiting = self.awaiting - 1
end

--- Queues a call whose method was just handed to the engine. `late(result)` is called when the
--- answer comes after the caller has given up.
function Session:expect(calls, what, late)
  local call = { what = what, condition = self.runtime.condition(), late = late, done = false }
  calls:push(call)
  self:touch()
  return call
end

local function wait_for(self, call, deadline)
  local now = self.runtime.now
  while not call.done do
    local left = deadline - now()
    if left <= 0 then return end
    self:block(call.condition, left)
  end
end

--- Waits for a call: its result, or nil, err.
function Session:await(call, timeout)
  local whole, err = protect(wait_for, self, call, self.runtime.now() + timeout)
  if not whole then -- the task was cancelled, or may not wait here: nobody takes the answer
    self.awaiting = self.awaiting - 1
    call.abandoned = true
    if call.done and call.ok and call.late then call.late(call.result, call.extra) end
    error(err, 0)
  end
  if not call.done then
    call.abandoned = true
    return nil, self:error("timeout", ("no answer to %s within %g s"):format(call.what, timeout))
  end
  if call.ok then return call.result, call.extra end
  return nil, call.result
end

--- An error of this session's endpoint.
function Session:error(kind, message, more)
  local fields = more or {}
  fields.kind, fields.message, fields.endpoint = kind, message, self.endpoint
  return errors.new(fields)
end

local status_errors = {
  blocked = { "blocked", "the broker has blocked publishing: it is short of memory or disk space" },
  window = { "overflow", "the window of unconfirmed publishes is full" },
  overflow = { "overflow", "the output buffer is full (max_buffer)" },
  memory = { "overflow", "out of memory" },
  no_channels = { "overflow", "all channels that the broker allows on a connection are open (channel_max)" },
}

--- The error for a status of the engine; throws for mistakes of the program, at `level` of the caller.
function Session:refusal(status, what, level)
  if status == "closed" then return self.reason or self:error("closed", "the connection is closed") end
  if status == "too_large" then
    return self:error("overflow",
      what .. ": too large (a body over max_message_size, or headers that don't fit a frame)",
      { code = 311, temporary = false })
  end
  local known = status_errors[status]
  if known then return self:error(known[1], known[2]) end
  error(what .. ": an argument is out of range or nested too deep", (level or 2) + 1)
end

-- ---- Writing ----------------------------------------------------------------------------------------

--- Something is to be written (or a deadline has changed): the writer runs at the next turn.
function Session:touch()
  if not self.dirty then
    self.dirty = true
    self.wake:signal()
  end
end

--- Writes what can be written at once; never yields.
function Session:try_flush()
  if not self.corked and not self.write_error then self.transport:try_flush(self.engine) end
  if self.engine:pending() > 0 then self:touch() end
end

-- The loop was away for long: what the broker sent meanwhile must be read before its silence is judged.
local function late(self, by)
  self.runtime.sleep(0)
  local interval = self.heartbeat
  local reported = self.turn_reported and self.runtime.now() - self.turn_reported < by + 1
  if interval > 0 and by > interval / 4 and not reported then
    local source = self.runtime.turn_source and self.runtime.turn_source()
    self.log("warn", ("the event loop stood still for %.1f s: heartbeats need a turn every few seconds%s"):format(by,
      source and " (" .. tostring(source) .. ")" or ""))
  end
end

-- Runtimes that time the turns of their tasks, and the sessions with heartbeats that want to hear of long ones.
local watchers = setmetatable({}, { __mode = "k" })

local function shortest(sessions)
  local limit
  for session in pairs(sessions) do limit = min(limit or huge, session.heartbeat / 4) end
  return limit
end

local function watch_turns(self)
  local runtime = self.runtime
  if not runtime.turn_source then return end
  local watcher = watchers[runtime]
  if not watcher then
    local sessions = setmetatable({}, { __mode = "k" })
    watcher = { sessions = sessions }
    function watcher.report(seconds, source)
      for session in pairs(sessions) do
        if seconds > session.heartbeat / 4 then
          session.turn_reported = runtime.now()
          runtime.spawn(session.log, "warn",
            ("the event loop stood still for %.1f s: heartbeats need a turn every few seconds (%s)"):format(seconds,
              tostring(source)))
        end
      end
    end
    watchers[runtime] = watcher
  end
  if runtime.on_long_turn and runtime.on_long_turn ~= watcher.report then return end -- the user's own
  watcher.sessions[self] = true
  runtime.on_long_turn = watcher.report
  runtime.long_turn = shortest(watcher.sessions)
end

local function unwatch_turns(self)
  local runtime = self.runtime
  local watcher = watchers[runtime]
  if not watcher or not watcher.sessions[self] then return end
  watcher.sessions[self] = nil
  if runtime.on_long_turn == watcher.report then
    runtime.long_turn = shortest(watcher.sessions)
    if not runtime.long_turn then runtime.on_long_turn = nil end
  end
end

-- Writes everything. A write that has to wait is watched meanwhile; one that does not wakes nobody.
local function flush_all(self, transport, engine)
  if not transport.blind then
    local done, kind, text = transport:try_flush(engine)
    if kind ~= "again" then return done, kind, text end
    self.stuck:signal()
  end
  self.flushing = true
  local done, kind, text = transport:flush(engine)
  self.flushing = false
  return done, kind, text
end

local function write_loop(self)
  local engine, transport, wake, now = self.engine, self.transport, self.wake, self.runtime.now
  while self.state ~= "closed" do
    self.dirty = false
    self.corked = false
    if not self.write_error then
      local ok, kind, text = flush_all(self, transport, engine)
      if ok then
        self.room:signal()
        self.flushed:broadcast()
      else
        -- The broker may have said why before it hung up: reading goes on for a moment.
        self.write_error = text or kind or "closed"
        self.write_error_at = now()
      end
    end
    if self.state == "closed" then break end
    if not self.dirty then
      local t = now()
      local deadline = engine:deadline(t)
      local left = deadline and max(0, deadline - t)
      if self.write_error then
        local rest = self.write_error_at + LAST_WORDS - t
        if rest <= 0 then
          engine:eof(self.write_error)
          self:pump()
          break
        end
        left = left and min(left, rest) or rest
      end
      if not left or left > 0 then
        wake:wait(left)
        if deadline and self.state ~= "closed" then
          local after = now()
          if after - deadline > 0.5 then late(self, after - deadline) end
        end
      end
      if self.state ~= "closed" then
        engine:tick(now())
        self:pump()
      end
    end
  end
  self.ended:broadcast()
  self.stuck:broadcast()
  if self.last_flush then
    transport:flush(engine)
    transport:close()
    self.last_flush = false
    self.left:broadcast()
  end
end

-- A flush may wait for as long as the socket is full: a peer that takes nothing and says nothing is
-- noticed here, as soon as the writer would notice it. (The engine takes ticks that are further apart than three
-- quarters of an interval for a standstill of this process.) Until then nothing is to be done: where a transport cannot tell
-- that a write waits, what is looked for is a broker that has been silent for long.
local function watch_loop(self)
  local engine, now, quarter = self.engine, self.runtime.now, self.heartbeat / 4
  while self.state ~= "closed" do
    local silent_at, wait = engine:silence_deadline(), nil
    local left = silent_at and silent_at - now()
    if self.flushing then
      wait = left and min(quarter, max(SHORTEST_LOOK, left)) or quarter
    elseif self.transport.blind then
      wait = left and max(quarter, left - 2 * quarter) or quarter
    end
    self.stuck:wait(wait)
    if self.flushing and self.state ~= "closed" then
      local deadline = engine:deadline(now())
      if deadline and deadline <= now() then
        engine:tick(now())
        self:pump()
      end
    end
  end
end

-- ---- Reading ----------------------------------------------------------------------------------------

-- A consumer without acks, or a listener, has been given more than it takes: reading waits for it, unless somebody
-- waits for an answer that only reading can bring; then it answers true.
local function hold(self)
  local engine, now = self.engine, self.runtime.now
  if self.awaiting > 0 and self.admitted < MOST_ADMITTED and now() < self.awaiting_until then
    engine:admit()
    self.runtime.sleep(0) -- what waits has its deadline, and consumers want their turn
    return true
  end
  local detector = self.detector
  engine:pause(true, now())
  if detector then detector:pause(true, now()) end
  self.paused = true
  self.drained:wait(1)
  self.paused = false
  if self.state ~= "closed" then engine:pause(false, now()) end
  if detector then detector:pause(false, now()) end
end

local function read_loop(self)
  local engine, transport, now = self.engine, self.transport, self.runtime.now
  while self.state ~= "closed" do
    while self:is_overfull() and not hold(self) do end
    local n, kind, text = transport:fill(engine)
    if n then
      self:count_read(n)
      if self.detector then self.detector:heard(now()) end
    end
    if not n and kind ~= "full" then
      engine:eof(text or kind)
      n = 0
    end
    local events = self:pump()
    if not n and events == 0 and self.state ~= "closed" then hold(self) end
  end
end

--- A consumer or listener has taken what came: reading may go on.
function Session:drain()
  if self.paused then self.drained:signal() end
end

-- What a task of the session throws (for want of memory, say) ends the session: nobody else would do its work.
local function run(self, loop)
  local whole, err = protect(loop, self)
  if whole then return end
  local text = tostring(err)
  if self.state ~= "closed" then
    local memory = text:find("not enough memory", 1, true)
    self.engine:eof(text)
    self:finish(self:error(memory and "overflow" or "closed", "the connection has failed: " .. text,
      { temporary = true }))
    protect(self.pump, self) -- the engine too knows that this is the end
  end
  self.transport:close()
  self.log("error", "a task of the connection threw: " .. text)
end

-- ---- Events -----------------------------------------------------------------------------------------

local handlers = {}

function handlers.open(self)
  if self.state == "connecting" then
    self.state = "open"
    self.channel_max, self.frame_max, self.heartbeat = self.engine:tuned()
    if self.heartbeat > 0 then
      self.runtime.spawn(run, self, watch_loop)
      watch_turns(self)
    end
    if self.health then require("moonrabbit.health.watch").start(self, self.health, run) end
    self:touch() -- heartbeats are due from now on
    self.changed:broadcast()
  end
end

-- "queue.declare" of "queue.declare-ok"
local asked = setmetatable({}, {
  __index = function(self, reply)
    local method = reply:gsub("%-ok$", ""):gsub("%-empty$", "")
    self[reply] = method
    return method
  end,
})

function handlers.reply(self, owner, method, fields)
  local call = (owner and owner._calls or self.calls):pop(asked[method])
  if call then resolve(call, true, fields or {}, method) end
end

function handlers.get(_, owner, message)
  local call = owner._calls:pop "basic.get"
  if call then resolve(call, true, message, "basic.get-ok") end
end

function handlers.deliver(_, owner, queue)
  local receiver = owner._receivers[queue]
  if receiver then receiver:_delivered() end
end

function handlers.confirm(_, owner)
  owner:_confirmed()
end

function handlers.failed(_, owner, seq, outcome, confirmation)
  owner:_failed(seq, outcome, confirmation)
end

handlers["return"] = function(self, owner, message, seq)
  owner:_returned(message, seq)
  self.emit("return", message, owner)
end

function handlers.cancel(_, owner, consumer_tag, queue)
  owner:_consumer_cancelled(consumer_tag, queue)
end

function handlers.flow(self, owner, active)
  owner:_flow(active)
  if active then self.room:signal() end
end

function handlers.channel_closed(self, owner, report)
  owner:_closed_by_broker(self:report(report))
end

function handlers.blocked(self, reason)
  self.blocked = reason or ""
  self.emit("blocked", reason)
end

function handlers.unblocked(self)
  self.blocked = nil
  self.room:signal()
  for channel in pairs(self.channels) do channel._room:signal() end
  self.emit("unblocked")
end

function handlers.closed(self, report)
  local err = self.verdict or self:report(report)
  if err.kind == "timeout" and not err.strategy and self.heartbeat > 0 then
    err.strategy = "fixed" -- the core's own: two heartbeat intervals
    self.emit("suspect", err.strategy, err.message)
  end
  self:finish(err)
end

--- The broker's silence is suspicious (moonrabbit.health): the session ends.
---@param suspicion moonrabbit.health.Suspicion
function Session:suspect(suspicion)
  self.emit("suspect", suspicion.strategy, suspicion.text)
  self.verdict = self:error("timeout", suspicion.text, { strategy = suspicion.strategy, temporary = true })
  self.engine:eof(suspicion.text)
  self:pump()
end

--- An error from what the engine reports, with the endpoint and without the password.
function Session:report(report)
  local err = errors.from_engine(report, self.endpoint)
  for _, secret in ipairs(self.secrets) do
    local from, to = err.message:find(secret, 1, true)
    while from do
      err.message = err.message:sub(1, from - 1) .. "***" .. err.message:sub(to + 1)
      from, to = err.message:find(secret, from + 3, true)
    end
  end
  return err
end

--- A password that the broker knows, or may come to know: it is not repeated from it. Those before it are
--- remembered for some time.
function Session:keep_secret(secret)
  if not secret or #secret <= 3 then return end
  local secrets = self.secrets
  table.insert(secrets, 1, secret)
  secrets[MOST_SECRETS + 1] = nil
end

--- Takes every event there is. Returns how many there were.
function Session:pump()
  local engine = self.engine
  local n = 0
  local event, a, b, c, d = engine:pump()
  while event do
    n = n + 1
    handlers[event](self, a, b, c, d)
    event, a, b, c, d = engine:pump()
  end
  if not self.dirty and engine:pending() > 0 then self:touch() end -- its answers
  return n
end

-- ---- Beginning and end ------------------------------------------------------------------------------

--- The session is over: everything that waits learns why.
function Session:finish(err)
  if self.state == "closed" then return end
  unwatch_turns(self)
  local goodbye = self.state == "closing"
  if self.state == "closing" and (err.code == nil or err.code == 200) and err.kind == "closed" then
    self.said_goodbye = err.code == 200 -- the broker has answered
    self.cut_short = err
    err = self:error("closed", "the connection was closed by this side", { temporary = false })
  end
  self.state = "closed"
  self.reason = err
  self.transport:try_flush(self.engine)
  if self.engine:pending() == 0 or self.write_error then
    self.transport:close()
  else
    self.last_flush = true
    self.runtime.spawn(function()
      if self.last_flush then self.left:wait(LAST_FLUSH) end
      self.transport:close()
    end)
  end
  self.calls:fail(err)
  local channels = self.channels
  self.channels = {}
  local meanwhile = not goodbye and self.survives and self.survives(self, err)
  for channel in pairs(channels) do channel:_session_ended(err, meanwhile) end
  for calls in pairs(self.closing) do calls:fail(err) end
  self.dirty = true
  self.wake:broadcast()
  self.drained:broadcast()
  self.room:broadcast()
  self.flushed:broadcast()
  self.changed:broadcast()
  self.ended:broadcast()
  self.stuck:broadcast()
  self.emit("closed", err)
end

local function shake_hands(self, deadline, timeout)
  local now = self.runtime.now
  while self.state == "connecting" do
    local left = deadline - now()
    if left <= 0 then
      self:finish(self:error("timeout",
        ("the broker did not finish the AMQP handshake within %g s (is it an AMQP port?)"):format(timeout)))
    else
      self.changed:wait(left < huge and left or nil)
    end
  end
end

--- Connects and shakes hands.
---@param config table runtime, endpoint {host, port, path}, label, tls, engine (config of core.engine), timeout, secret, log, emit, overfull, health, survives
---@return moonrabbit.Session|nil, moonrabbit.Error?
function Session.open(config)
  local runtime, timeout = config.runtime, config.timeout
  local now = runtime.now
  local deadline = now() + timeout
  local engine = core.engine(config.engine)
  local transport, kind, text, temporary = runtime.open(config.endpoint, config.tls,
    timeout < huge and timeout or nil)
  if not transport then
    return nil, errors.new {
      kind = kind, message = text or kind, endpoint = config.label,
      temporary = temporary,
    }
  end
  local condition = runtime.condition
  local self = setmetatable({
    engine = engine, transport = transport, runtime = runtime, state = "connecting",
    endpoint = config.label, secrets = {}, log = config.log, emit = config.emit, health = config.health,
    overfull = config.overfull, -- () -> whether nothing more is to be read, but for answers
    survives = config.survives, -- (session, err) -> what the calls of its channels are told until they are back, or nil
    channels = {}, calls = Calls.new(),
    closing = {},  -- the calls of channels that wait for their channel.close-ok
    dirty = false, corked = false, flushing = false, paused = false, heartbeat = 0,
    awaiting = 0,          -- tasks in `block`, and those that something was thrown into there
    awaiting_until = 0,    -- the latest that one of them waits
    admitted = 0,          -- bytes read past a full consumer or listener
    wake = condition(),    -- the writer
    drained = condition(), -- the reader, while it is paused
    room = condition(),    -- publishers that wait for buffer space or for the broker to unblock
    flushed = condition(),
    changed = condition(), -- the state
    ended = condition(),
    stuck = condition(),   -- the watch, which looks after a write that has to wait
    left = condition(),    -- the last bytes
  }, Session)
  self:keep_secret(config.secret)
  engine:start(now())
  runtime.spawn(run, self, write_loop)
  runtime.spawn(run, self, read_loop)
  local whole, err = protect(shake_hands, self, deadline, timeout)
  if not whole then -- the task was cancelled
    self:finish(self:error("closed", "nobody waits for the connection any more"))
    error(err, 0)
  end
  if self.state == "open" then return self end
  return nil, self.reason
end

--- Waits until everything written so far has left for the network, gathered acks too.
---@param timeout number
---@return true|nil, moonrabbit.Error?
function Session:flush(timeout)
  local now = self.runtime.now
  local deadline = now() + timeout
  for channel in pairs(self.channels) do channel._core:flush_acks() end
  self.corked = false
  if self.state ~= "closed" then self:try_flush() end
  while self.state ~= "closed" and self.engine:pending() > 0 do
    self:touch()
    local left = deadline - now()
    if left <= 0 then
      return nil, self:error("timeout", ("the broker did not take what is to be sent within %g s"):format(timeout))
    end
    self.flushed:wait(left < huge and left or nil)
  end
  if self.state == "closed" then return nil, self.reason end
  return true
end

--- Ends it as one whose peer is gone.
---@param text string why
function Session:fail(text)
  if self.state == "closed" then return end
  self.engine:eof(text)
  self:pump()
end

--- Sends what is to be sent, acks included, and Connection.Close; waits for its answer.
--- The session is closed afterwards, whatever comes back.
---@param timeout number
---@return true|nil, moonrabbit.Error?
function Session:close(timeout)
  if self.state == "closed" then return true end
  self:start_close()
  local now = self.runtime.now
  local deadline = now() + timeout
  while self.state ~= "closed" do
    local left = deadline - now()
    if left <= 0 then
      local err = self:error("timeout", ("the broker did not confirm the close within %g s"):format(timeout))
      self.engine:eof("closed")
      self:pump()
      self:finish(err)
      return nil, err
    end
    self:block(self.changed, left)
  end
  if self.said_goodbye then return true end
  return nil, self.cut_short or self.reason
end

--- The part of close that does not wait.
function Session:start_close()
  if self.state ~= "open" then return end
  self.state = "closing"
  self.emit("state", "closing")
  self.engine:close(200, "Goodbye")
  self.dirty = false
  self:touch()
end

Session.Calls = Calls

return Session
