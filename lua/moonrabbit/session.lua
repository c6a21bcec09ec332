--- One connection to one broker, from connect to close: the engine, its transport and its tasks.
--
-- A session ends for good; a Connection may outlive it. How it begins and ends is here; beside it, one subject a file:
--
-- * `session/reader.lua`: the task that waits for bytes, and when it waits for consumers
-- * `session/events.lua`: what the engine has to tell
-- * `session/writer.lua`: the task that sends and keeps the engine's deadlines, and the watch over writes that wait
-- * `session/turns.lua`: an event loop that stands still
-- * `session/waiting.lua`, `session/calls.lua`: who waits for which answer
-- * `session/errors.lua`: what goes wrong, in words
--
-- Users meet `moonrabbit.connection`, not this.
-- @module moonrabbit.session

local core = require "moonrabbit.core"
local described = require "moonrabbit.described"
local errors = require "moonrabbit.errors"
local parts = require "moonrabbit.parts"
local protect = require "moonrabbit.protect"
local Calls = require "moonrabbit.session.calls"
local events = require "moonrabbit.session.events"
local reader = require "moonrabbit.session.reader"
local turns = require "moonrabbit.session.turns"
local waiting = require "moonrabbit.session.waiting"
local words = require "moonrabbit.session.errors"
local writer = require "moonrabbit.session.writer"

local huge = math.huge

-- What is left to write when a session ends has so long to leave.
local LAST_FLUSH = 2

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

parts(Session, reader, events, writer, waiting, words)

-- ---- Beginning --------------------------------------------------------------------------------------

-- What a task of the session throws (for want of memory, say) ends the session: nobody else would do its work.
local function run(self, loop)
  local whole, err = protect(loop, self)
  if whole then return end
  local text = described(err)
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

--- Runs one of its loops in a task; an error that leaves it ends the session.
---@param loop fun(self: moonrabbit.Session)
function Session:start(loop) self.runtime.spawn(run, self, loop) end

--- The handshake is done.
function Session:opened()
  self.state = "open"
  self.channel_max, self.frame_max, self.heartbeat = self.engine:tuned()
  if self.heartbeat > 0 then
    self:start(self.watch_loop)
    turns.watch(self)
  end
  if self.health then require("moonrabbit.health.watch").start(self, self.health) end
  self:touch() -- heartbeats are due from now on
  self.changed:broadcast()
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

local function new(config, engine, transport)
  local runtime = config.runtime
  local condition = runtime.condition
  return setmetatable({
    engine = engine, transport = transport, runtime = runtime, state = "connecting",
    endpoint = config.label, secrets = {}, log = config.log, emit = config.emit, health = config.health,
    overfull = config.overfull, -- () -> whether nothing more is to be read, but for answers
    survives = config.survives, -- (session, err) -> what the calls of its channels are told until they are back, or nil
    heartbeat = 0,
    channels = {}, calls = Calls.new(),
    closing = {},          -- the calls of channels that wait for their channel.close-ok
    dirty = false,         -- the writer is going to run
    corked = false,        -- nothing is to be written before it does
    flushing = false,      -- a write waits, or may
    paused = false,        -- the reader waits for `drained`
    awaiting = 0,          -- tasks in `block`
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
end

--- Connects and shakes hands.
---@param config table runtime, endpoint {host, port, path}, label, tls, engine (config of core.engine), timeout, secret, log, emit, overfull, health, survives
---@return moonrabbit.Session|nil, moonrabbit.Error?
function Session.open(config)
  local runtime, timeout = config.runtime, config.timeout
  local deadline = runtime.now() + timeout
  local engine = core.engine(config.engine)
  local transport, kind, text, temporary = runtime.open(config.endpoint, config.tls,
    timeout < huge and timeout or nil)
  if not transport then
    return nil, errors.new {
      kind = kind, message = text or kind, endpoint = config.label,
      temporary = temporary,
    }
  end
  local self = new(config, engine, transport)
  self:keep_secret(config.secret)
  engine:start(runtime.now())
  self:start(self.write_loop)
  self:start(self.read_loop)
  local whole, err = protect(shake_hands, self, deadline, timeout)
  if not whole then -- the task was cancelled
    self:finish(self:error("closed", "nobody waits for the connection any more"))
    error(err, 0)
  end
  if self.state == "open" then return self end
  return nil, self.reason
end

-- ---- Ending -----------------------------------------------------------------------------------------

-- Why it ended, to those who ask: this side closed it, unless something else came between.
local function reason_of(self, err)
  if self.state ~= "closing" or not (err.code == nil or err.code == 200) or err.kind ~= "closed" then return err end
  self.said_goodbye = err.code == 200 -- the broker has answered
  self.cut_short = err
  return self:error("closed", "the connection was closed by this side", { temporary = false })
end

-- Closes the transport, once what is still to be written has left.
local function hang_up(self)
  self.transport:try_flush(self.engine)
  if self.engine:pending() == 0 or self.write_error then
    self.transport:close()
    return
  end
  self.last_flush = true
  self.runtime.spawn(function()
    if self.last_flush then self.left:wait(LAST_FLUSH) end
    self.transport:close()
  end)
end

-- Whatever waits on it learns why it ended. `goodbye`: it was to end. What one channel throws (for want of memory) does
-- not keep the others from it.
local function tell(self, err, goodbye)
  self.calls:fail(err)
  local channels = self.channels
  self.channels = {}
  local meanwhile = not goodbye and self.survives and self.survives(self, err)
  local all, problem = true, nil
  for channel in pairs(channels) do
    local whole, thrown = pcall(channel._session_ended, channel, err, meanwhile)
    if not whole then all, problem = false, thrown end
  end
  for calls in pairs(self.closing) do calls:fail(err) end
  self.dirty = true
  self.wake:broadcast()
  self.drained:broadcast()
  self.room:broadcast()
  self.flushed:broadcast()
  self.changed:broadcast()
  self.ended:broadcast()
  self.stuck:broadcast()
  if not all then error(problem, 0) end
end

--- The session is over: everything that waits learns why.
---@param err moonrabbit.Error
function Session:finish(err)
  if self.state == "closed" then return end
  turns.unwatch(self)
  local goodbye = self.state == "closing"
  err = reason_of(self, err)
  self.state, self.reason = "closed", err
  hang_up(self)
  local all, problem = pcall(tell, self, err, goodbye)
  self.emit("closed", err) -- a connection that was not told would stay on it
  if not all then error(problem, 0) end
end

--- Ends it as one whose peer is gone.
---@param text string why
function Session:fail(text)
  if self.state == "closed" then return end
  self.engine:eof(text)
  self:pump()
end

--- The broker's silence is suspicious (moonrabbit.health): the session ends.
---@param suspicion moonrabbit.health.Suspicion
function Session:suspect(suspicion)
  self.emit("suspect", suspicion.strategy, suspicion.text)
  self.verdict = self:error("timeout", suspicion.text, { strategy = suspicion.strategy, temporary = true })
  self:fail(suspicion.text)
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

return Session
