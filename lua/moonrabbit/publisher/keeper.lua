--- What makes a publisher survive: it keeps each message until its confirm, over all the channels that come and go.
--
-- * up, nothing unsent: a message goes out as it comes (Publisher:send_async does that by itself, up to `fast`);
-- * down: messages are kept, `unsent` is the oldest number that waits for the next channel;
-- * up again: `feed` sends from `unsent` on, in order, as fast as the window and the buffer allow. Numbers up to
--   `sent` have been on the wire before and carry the mark; what is new waits behind them;
-- * a message that the broker refuses gets a time when it is due, and goes again then or with the next channel;
-- * a channel on which it refuses again and again is left for another one: until then nothing is sent (renewal.lua).
--
-- The core holds the confirmations: until one is concluded, or acked, it is pending, whatever channel it was on.
-- Nothing that a channel calls here (`_confirmed`, `_failed`, `lost`, `recovered`, `ended`) yields.
-- @module moonrabbit.publisher.keeper

local core = require "moonrabbit.core"
local random = require "moonrabbit.random"
local Renewal = require "moonrabbit.publisher.renewal"
local Ring = require "moonrabbit.publisher.ring"
local Waiters = require "moonrabbit.publisher.waiters"

local acked, outcome_of, conclude_core = core.acked, core.outcome, core.conclude
local max, min, huge = math.max, math.min, math.huge

-- How many failed messages are remembered for Publisher:wait.
local MAX_FAILURES = 10000
-- Seconds after which room is looked for again when nobody says that there is some.
local LOOK_AGAIN = 0.5
-- The same for a message whose time has come while there was no room.
local NO_ROOM_PAUSE = 0.05

local MARK = { ["moonrabbit-resent"] = true }
-- Refusals of the core that pass.
local passing = { window = true, overflow = true, blocked = true, memory = true, closed = true }
local without_signal = { overflow = true, blocked = true, memory = true }

---@class moonrabbit.publisher.Keeper
---@field channel moonrabbit.Channel
---@field ring moonrabbit.publisher.Ring
---@field fast integer     up to this number a message may be sent without asking; 0: ask
---@field resent integer   how often a message was sent again
local Keeper = {}
Keeper.__index = Keeper

Keeper.MARK = MARK

-- What a confirmation failed of.
local failure_of = setmetatable({}, { __mode = "k" })

--- config: channel, route and again (core.route, plain and with the mark), policy, window (0: none),
--- most (messages), most_bytes, outbox (moonrabbit.publisher.outbox) or nil
function Keeper.new(config)
  local runtime = config.channel._runtime
  local self = setmetatable({
    channel = config.channel, runtime = runtime, ring = Ring.new(), waiters = Waiters.new(runtime),
    fast = 0, resent = 0,
    _route = config.route, _again = config.again, _policy = config.policy, _strict = config.window == 1,
    _most = config.most, _most_bytes = config.most_bytes, _outbox = config.outbox,
    _up = true, _core = config.channel._core,
    _sent = 0,                        -- everything up to it has been on the wire
    _unsent = nil,                    -- the oldest number that is to be sent (again); nil: none
    _troubled = {},                   -- number -> record with a `due` or a `give_up`
    _due = 0,                         -- how many have a `due`
    _failures = {}, _renewal = Renewal.new(),
    _room = runtime.condition(),      -- who has a message to give
    _settled = runtime.condition(),   -- who waits for all of them
    _alarm = runtime.condition(),     -- the task that keeps the times
  }, Keeper)
  function self._ended(record) self:_over(record) end
  return self
end

-- ---- Sending ----------------------------------------------------------------------------------------

-- With a window of one, what is to go again goes before anything newer.
local function held_up(self) return self._strict and self._due > 0 end

-- Whether anything may go out on the channel.
local function sends(self) return self._up and not self._renewal.by end

local function refresh(self)
  local ring = self.ring
  if sends(self) and not self._unsent and not self._outbox and not self._closed and ring.bytes < self._most_bytes
    and not held_up(self) then
    self.fast = ring.first - 1 + min(ring.size, self._most)
  else
    self.fast = 0
  end
end

local function hand(self, n, message, confirmation, marked)
  local core_channel = self.channel._core
  local route = marked and self._again or self._route
  if type(message) == "string" then return core_channel:publish_route(route, message, n, confirmation) end
  if not message.props then return core_channel:publish_route(route, message.body, n, confirmation) end
  local props = message.props
  if marked then props = core.set_headers(props, MARK) or props end
  return core_channel:publish_packed(message.exchange, message.routing_key, message.mandatory, props, message.body, n,
    confirmation)
end

-- Hands a message to the engine: the confirmation and whether to flush, or nil, status. A message whose headers just
-- fit goes again without the mark, rather than not at all.
local function put(self, n, message, confirmation, again)
  local marked = again or type(message) == "table" and message.again
  local ok, flush = hand(self, n, message, confirmation, marked)
  if not ok and flush == "too_large" and marked then return hand(self, n, message, confirmation, false) end
  return ok, flush
end

local function left_for(self, flush)
  local session = self.channel._session
  if flush then session:try_flush() elseif not session.dirty then session:touch() end
end

local function not_due(self, n, record)
  if type(record) ~= "table" then return end
  if record.due then
    record.due = nil
    self._due = self._due - 1
  end
  if not record.give_up then self._troubled[n] = nil end
end

-- The error of a message that the engine will never take.
local function hopeless(self, status)
  local session = self.channel._session
  if status == "bad_argument" then
    return session:error("protocol", "the message cannot be sent: its properties are malformed", { temporary = false })
  end
  return session:refusal(status, "publish")
end

-- Sends what is to be sent, in order. Why it stopped: nil when it is done.
local function feed(self)
  local ring = self.ring
  while self._unsent do
    if not sends(self) then return "down" end
    local n = self._unsent
    local message, confirmation = ring:at(n)
    if held_up(self) and not (type(message) == "table" and message.due) then return "held" end
    if message and not acked(confirmation) then
      local again = n <= self._sent
      local ok, flush = put(self, n, message, confirmation, again)
      if ok then
        not_due(self, n, message)
        if again then self.resent = self.resent + 1 end
        left_for(self, flush)
      elseif passing[flush] then
        return flush
      else
        self:_conclude(n, "lost", hopeless(self, flush))
      end
    end
    if n > self._sent then self._sent = n end
    self._unsent = n < ring.last and n + 1 or nil
  end
end

-- Feeds, and goes on in a task where room comes without a confirm of ours.
local function pour(self)
  if self._feeding then return end
  self._feeding = true
  local status = feed(self)
  self._feeding = false
  refresh(self)
  if not without_signal[status] or self._pouring then return end
  self._pouring = true
  self.runtime.spawn(function()
    repeat
      local session = self.channel._session
      session.corked = false
      session:try_flush()
      session.room:wait(LOOK_AGAIN)
      self._feeding = true
      status = feed(self)
      self._feeding = false
      session.room:signal() -- there may be room for others too
    until not without_signal[status]
    self._pouring = false
    refresh(self)
  end)
end

-- ---- Taking messages --------------------------------------------------------------------------------

function Keeper:_closed_error()
  local session = self.channel._session
  local reason = self._closed or session.reason
  return reason or session:error("closed", "the publisher is closed", { temporary = false })
end

-- Why nothing is taken now: nil when something is.
local function full(self)
  local ring = self.ring
  if self._outbox and self._outbox.backlog then return "the outbox still holds messages from before" end
  if ring:count() >= self._most then return ("%d messages are kept already"):format(ring:count()) end
  if ring.bytes >= self._most_bytes and ring:count() > 0 then
    return ("%d bytes of messages are kept already"):format(ring.bytes)
  end
end

--- Waits until one more may be taken, until `deadline`.
---@return true|nil, moonrabbit.Error?
function Keeper:room(deadline, timeout)
  local now, waited = self.runtime.now, false
  repeat
    if self._closed then return nil, self:_closed_error() end
    local why = full(self)
    if not why then
      if waited then self._room:signal() end
      return true
    end
    local session = self.channel._session
    session.corked = false
    session:try_flush()
    local left = deadline - now()
    if left <= 0 then
      if self._outbox and self._outbox.problem then return nil, self._outbox.problem end
      local blocked = session.blocked
      return nil, session:error((blocked or session.held) and "blocked" or "overflow",
        ("the message was not taken%s: %s%s"):format(timeout > 0 and (" within %g s"):format(timeout) or "", why,
          session.held and ", and " .. session.held or blocked and ", and the broker has blocked publishing" or ""))
    end
    session:block(self._room, left)
    waited = true
  until false
end

-- The message goes out at once where nothing stands before it: confirmation, or nil, status.
local function try_now(self, n, message)
  if not sends(self) or self._unsent or held_up(self) then return nil end
  local confirmation, flush = put(self, n, message)
  if confirmation then left_for(self, flush) end
  return confirmation, flush
end

-- Kept for the time being: how long is the policy's business.
local function trouble(self, n)
  local deadline = self._policy.deadline
  if deadline == huge then return end
  local record = self.ring:record(n)
  record.give_up = record.give_up or self.runtime.now() + deadline
  self._troubled[n] = record
  self:_wake_at(record.give_up)
end

local function takes(self) return not self._closed and self.channel._session.state ~= "closing" end

--- Takes a message, for which there is room: its confirmation. Never waits.
---@param message string|table a body for the route, or a record
---@return moonrabbit.Confirmation|nil, moonrabbit.Error?
function Keeper:take(message)
  local ring = self.ring
  if not takes(self) then return nil, self:_closed_error() end
  local fresh = self._outbox and not message.row
  if fresh then
    local row, err = self._outbox:add(message)
    if not row then return nil, err end
    message.row = row
  end
  ring:reserve()
  local n = ring.last + 1
  if type(message) == "table" then message.number = n end
  local confirmation, status = try_now(self, n, message)
  if not confirmation and status and not passing[status] then
    if fresh then self._outbox:done(message.row) end -- its sender is told
    return nil, hopeless(self, status)
  end
  ring:add(message, confirmation or self._core:hold(n))
  if not confirmation then
    self._unsent = self._unsent or n
    if not self._up then trouble(self, n) end
    if status then pour(self) end
  end
  refresh(self)
  local _, mine = ring:at(n)
  return mine
end

-- ---- Outcomes ---------------------------------------------------------------------------------------

--- A record is done with.
---@package
function Keeper:_over(record)
  not_due(self, record.number, record)
  self._troubled[record.number] = nil
  if record.row then self._outbox:done(record.row) end
end

-- Something has been settled: the ring may shrink, and whoever waits for that goes on.
local function settled(self)
  local ring = self.ring
  if ring:advance(self._ended) then
    if self._outbox then self:_load() end
    self._room:signal()
  end
  if ring.first > ring.last then
    self._unsent = nil
    self._settled:broadcast()
  end
  if self._renewal.by and self.channel._core:unconfirmed() == 0 then self:_wake_at(self.runtime.now()) end
  if self._unsent and not self._feeding then pour(self) end
  refresh(self)
end

--- A message has failed for good.
---@package
function Keeper:_conclude(n, outcome, err)
  local message, confirmation = self.ring:at(n)
  if not message or acked(confirmation) then return end
  conclude_core(confirmation, outcome)
  failure_of[confirmation] = err
  if type(message) == "table" then
    if message.row then
      self._outbox:failed(message.row)
      message.row = nil
    end
    self:_over(message)
  end
  self.ring:settle(n)
  if not self.waiters:settled(confirmation) then
    local failures = self._failures
    if #failures < MAX_FAILURES then
      failures[#failures + 1] = { seq = n, outcome = outcome, err = err }
    else
      failures.more = (failures.more or 0) + 1
    end
  end
  settled(self)
end

--- The error of a confirmation that is settled and not acked.
---@package
function Keeper:_failure(confirmation)
  return failure_of[confirmation] or self.channel:_failure(confirmation)
end

--- Some publishes of the channel were acked.
---@package
function Keeper:_confirmed()
  self.waiters:wake()
  settled(self)
end

--- A publish of the channel was refused or came back; false: it is none of the publisher's.
---@package
function Keeper:_failed(outcome, confirmation, err)
  local _, _, n = outcome_of(confirmation)
  if not n then return false end
  local message, current = self.ring:at(n)
  if not message or current ~= confirmation then return true end
  local record, now = self.ring:record(n), self.runtime.now()
  record.attempts = (record.attempts or 0) + 1
  if self._policy.deadline < huge then record.give_up = record.give_up or now + self._policy.deadline end
  local delay = self._policy:delay(outcome, record.attempts, random.number())
  if not delay or now + delay > (record.give_up or huge) then
    self:_conclude(n, outcome, err)
    return true
  end
  record.due, record.err, record.outcome = now + delay, err, outcome
  self._due = self._due + 1
  self._troubled[n] = record
  self:_wake_at(record.due)
  settled(self) -- there is room in the channel's window for the next one
  return true
end

-- ---- Times ------------------------------------------------------------------------------------------

local function go_again(self, n, record, now)
  if not sends(self) or self._unsent and n >= self._unsent then
    record.due = now + LOOK_AGAIN -- it goes with the next channel, or in its turn
    return
  end
  local message, confirmation = self.ring:at(n)
  local ok, flush = put(self, n, message, confirmation, true)
  if ok then
    not_due(self, n, record)
    self.resent = self.resent + 1
    left_for(self, flush)
  elseif passing[flush] then
    record.due = now + NO_ROOM_PAUSE
  else
    self:_conclude(n, "lost", hopeless(self, flush))
  end
end

local function given_up(self, record)
  local err = record.err
  local session = self.channel._session
  return record.outcome or "lost", session:error(err and err.kind or "timeout",
    ("given up after %g s (retry.deadline): %s"):format(self._policy.deadline,
      err and err.message or "the broker has not confirmed the message, whose outcome is unknown"),
    err and { code = err.code, class = err.class, method = err.method })
end

-- A message that is due and may do better on another channel.
local function badly_served(self, now)
  for _, record in pairs(self._troubled) do
    if record.due and record.due <= now and self._renewal:helps(record, now) then return record end
  end
end

-- Leaves the channel for such a message, once nothing is under way on it.
local function renew(self, now)
  local renewal = self._renewal
  if not self._up then return end
  if not renewal.by then
    local record = badly_served(self, now)
    if not record then return end
    renewal:begin(record.err, now)
  end
  local idle = self.channel._core:unconfirmed() == 0
  if not idle and now < renewal.by then return self:_wake_at(renewal.by) end
  local why = renewal:over(now)
  if idle then self.channel:_renew(why) end
end

-- Does what is due, the oldest first; when there is something again, or nil.
local function tend(self)
  renew(self, self.runtime.now())
  local numbers, now, next_time = {}, self.runtime.now(), huge
  for n in pairs(self._troubled) do numbers[#numbers + 1] = n end
  table.sort(numbers)
  for _, n in ipairs(numbers) do
    local record = self._troubled[n]
    local message, confirmation = self.ring:at(n)
    if not message or acked(confirmation) then
      self._troubled[n] = nil
    elseif record then
      if record.give_up and record.give_up <= now then
        self:_conclude(n, given_up(self, record))
      elseif record.due and record.due <= now then
        go_again(self, n, record, now)
      end
      record = self._troubled[n]
      if record then next_time = min(next_time, record.due or huge, record.give_up or huge) end
    end
  end
  if self._unsent then pour(self) end
  refresh(self)
  return next_time
end

local function keep_time(self)
  local now = self.runtime.now
  while not self._closed and self._wake < huge do
    local left = self._wake - now()
    if left > 0 then
      self._alarm:wait(left)
    else
      self._wake = huge
      local next_time = tend(self)
      self._wake = min(self._wake, next_time)
    end
  end
  self._timing = false
end

---@package
function Keeper:_wake_at(time)
  if not self._timing then
    self._timing, self._wake = true, time
    self.runtime.spawn(keep_time, self)
  elseif time < self._wake then
    self._wake = time
    self._alarm:signal()
  end
end

-- ---- Channels that come and go ----------------------------------------------------------------------

-- Everything that is not settled waits for the next channel.
local function all_unsent(self)
  local ring = self.ring
  self._sent = max(self._sent, (self._unsent or ring.last + 1) - 1)
  self._unsent = ring.first <= ring.last and ring.first or nil
end

--- The channel's core channel is gone; another may come. What the broker closed for good (no such exchange, say)
--- ends what was on its way: it would only end the next channel too.
function Keeper:lost(err)
  if self._closed then return end
  self._up = false
  self._renewal:forget()
  self.ring:advance(self._ended)
  all_unsent(self)
  refresh(self)
  local fatal = err and err.kind == "channel" and not err.temporary
  for _, n in ipairs((fatal or self._policy.deadline < huge) and self.ring:unsettled() or {}) do
    if fatal and n <= self._sent then
      self:_conclude(n, "lost", self:_unknown(err))
    else
      trouble(self, n)
    end
  end
end

--- The channel is usable again.
function Keeper:recovered()
  if self._closed then return end
  self._up, self._core = true, self.channel._core
  pour(self)
end

---@package
function Keeper:_unknown(err)
  return self.channel._session:error(err.kind, "the outcome of the publish is unknown: " .. err.message,
    { code = err.code, class = err.class, method = err.method, temporary = err.temporary })
end

--- There will be no other channel: whatever is not settled is lost, or stays in the outbox.
function Keeper:ended(err)
  if self._closed then return end
  self.ring:advance(self._ended)
  self._closed, self._up = err, false
  if self._outbox then self._outbox.ending = true end
  local left = self.ring:unsettled()
  if #left > 0 then
    local unknown = self:_unknown(err)
    for _, n in ipairs(left) do self:_conclude(n, "lost", unknown) end
  end
  self.ring:advance(self._ended)
  refresh(self)
  self._room:broadcast()
  self._settled:broadcast()
  self._alarm:broadcast()
  if self._outbox then self._outbox:close() end
end

--- Takes part in what happens to a channel.
function Keeper:attach(channel)
  channel._publisher = self
  if channel._watch then
    channel:_watch {
      lost = function(err) self:lost(err) end,
      recovered = function() self:recovered() end,
      ended = function(err) self:ended(err) end,
    }
  end
  local outbox = self._outbox
  if outbox then
    outbox.on_backlog = function() self:_load() end
    self:_load()
  end
  refresh(self)
end

--- Lets go of everything: the outcome of what is unsettled stays unknown.
function Keeper:close()
  self:ended(self.channel._session:error("closed", "the publisher was closed by this side", { temporary = false }))
end

--- See Publisher:stats.
function Keeper:stats()
  local outbox, unsent = self._outbox, 0
  for _, n in ipairs(self.ring:unsettled()) do
    if self._unsent and n >= self._unsent then unsent = unsent + 1 end
  end
  return {
    unconfirmed = self:unconfirmed(), unsent = unsent, bytes = self.ring.bytes, resent = self.resent,
    stored = outbox and outbox.count or 0,
  }
end

--- Gives the ring what the outbox holds from before, as far as there is room.
---@package
function Keeper:_load()
  local outbox = self._outbox
  while takes(self) and self.ring:count() < self._most and self.ring.bytes < self._most_bytes do
    local record = outbox:next()
    if not record then break end
    local confirmation, err = self:take(record)
    if not confirmation then outbox:refused(record.row, err) end
  end
  if not outbox.backlog then self._room:signal() end
end

-- ---- Waiting ----------------------------------------------------------------------------------------

-- Takes back what was never on the wire.
local function withdraw(self, confirmation, n)
  if self._outbox or not self._unsent or n < self._unsent or n <= self._sent then return false end
  self.waiters:settled(confirmation)
  conclude_core(confirmation, "lost")
  local message = self.ring:at(n)
  if type(message) == "table" then self:_over(message) end
  self.ring:settle(n)
  settled(self)
  return true
end

local function too_late(self, confirmation, n, timeout, own)
  local session = self.channel._session
  local state = not self._up and ": the connection is down, and recovering"
    or session.held and ": " .. session.held or session.blocked and ": the broker has blocked publishing" or ""
  if own and withdraw(self, confirmation, n) then
    return session:error(self._up and (session.blocked or session.held) and "blocked" or "timeout",
      ("the message was not sent within %g s%s"):format(timeout, state), { unsent = true })
  end
  return session:error("timeout", ("the broker has not confirmed the message within %g s%s"):format(timeout, state))
end

--- Waits for one confirmation. `own`: the caller alone hears of its failure, and of nothing else when it was
--- never sent: then it is taken back.
---@package
function Keeper:_wait(confirmation, timeout, own)
  local ok = acked(confirmation)
  if ok then return true end
  local _, _, n = outcome_of(confirmation)
  if not n then return self.channel:_wait(confirmation, timeout, own) end
  if ok == nil then return nil, self:_failure(confirmation) end
  timeout = timeout or self.channel.timeout
  if timeout > 0 then
    local now, current = self.runtime.now, self.runtime.current
    local deadline = now() + timeout
    local waiter = self.waiters:join(confirmation, own)
    local session = self.channel._session
    if current and not current() then
      session:try_flush() -- a plain script: no other task could add to this write
    else
      session:touch()
    end
    repeat
      local left = deadline - now()
      if left <= 0 then break end
      self.channel._session:block(waiter.condition, left)
      ok = acked(confirmation)
    until ok ~= false
    self.waiters:leave(waiter)
  end
  if ok then return true end
  if ok == nil then return nil, self:_failure(confirmation) end
  return nil, too_late(self, confirmation, n, timeout, own)
end

--- See Channel:_condition_of.
---@package
function Keeper:_condition_of(confirmation)
  local _, _, n = outcome_of(confirmation)
  if not n then return self.channel:_condition_of(confirmation) end
  return self.waiters:stay(confirmation).condition, self.runtime
end

local function all_failed(self, failed)
  local first = failed[1].err
  local err = self.channel._session:error(first.kind, ("%d publishes failed; the first: %s"):format(
    #failed + (failed.more or 0), first.message),
    { code = first.code, class = first.class, method = first.method, temporary = first.temporary })
  err.failed = failed
  return err
end

--- Waits until nothing is unsettled, as Channel:wait_for_confirms.
function Keeper:wait(timeout)
  local session, now = self.channel._session, self.runtime.now
  local deadline = now() + timeout
  session:touch()
  while self.ring.first <= self.ring.last do
    local left = deadline - now()
    if left <= 0 then break end
    self.channel._session:block(self._settled, left)
  end
  local failed, pending = self._failures, self:unconfirmed()
  self._failures = {}
  if pending == 0 and #failed == 0 then return true end
  if pending == 0 then return nil, all_failed(self, failed) end
  local err = self.channel._session:error("timeout", ("%d publishes were not confirmed within %g s"):format(pending,
    timeout))
  err.pending, err.failed = pending, failed
  return nil, err
end

--- How many messages are not settled.
---@return integer
function Keeper:unconfirmed()
  local ring = self.ring
  if ring.first > ring.last then return 0 end
  return #ring:unsettled()
end

return Keeper
