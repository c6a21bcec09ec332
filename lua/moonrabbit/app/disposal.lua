--- Disposal: what becomes of a message whose handler failed.
--
-- A copy goes up the ladder (retry) or into the parking queue (dead letter). Both functions return true only once the
-- broker has confirmed the copy and a queue has it; then the caller acks the original. On nil the original goes back,
-- by Disposal:give_back. So a message may be seen twice, and is never lost.
--
-- A copy that fails for a reason that may pass (the queue is full, the broker blocks, the connection is lost) is tried
-- again with growing pauses, for up to `hold` seconds, while the original stays unacked: returning it would only bring it
-- back at once, and each return counts against a delivery limit.
--
-- Short delays are waited for in the process: Disposal:in_process says which. The caller sleeps and runs the handler
-- again; the original stays unacked, and a crash means a redelivery. So it is for all retries of streams, exclusive
-- and server-named queues, and while a step of the ladder cannot be used.
--
--     local d = disposal.new { app = "orders", consumer = consumer, publisher = function() return channel end }
--     assert(d:setup(channel))
--     local attempt = d:attempt(msg)
--     …                                             -- the handler failed, the policy says: in 5 s again
--     if d:in_process(msg, 5) then
--       sleep(5)                                    -- and run the handler again, as attempt + 1
--     elseif d:retry(msg, 5, failure, attempt) then
--       msg:ack()
--     else
--       d:give_back(msg)
--     end
-- @module moonrabbit.app.disposal

local core = require "moonrabbit.core"
local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"
local copy = require "moonrabbit.app.copy"
local dead_letter = require "moonrabbit.app.dead_letter"
local headers = require "moonrabbit.app.headers"
local ladder = require "moonrabbit.app.ladder"
local steps = require "moonrabbit.app.steps"

local disposal = {}

---@class moonrabbit.DisposalConsumer what of a compiled consumer is looked at
---@field queue string
---@field dead_letter (string|false)?  the parking queue; `<app>.dead` by default; false: none, the original is rejected
---@field ladder (string|moonrabbit.LadderOptions|moonrabbit.Ladder)?  the app's name by default
---@field in_process (number|boolean)? seconds: delays up to this long are waited for in the process; 0.1 by default; true: all; false: none
---@field hold number?                 seconds for which a copy that fails is tried again; 300 by default

---@class moonrabbit.DisposalOptions
---@field app string
---@field consumer moonrabbit.DisposalConsumer
---@field publisher fun(): moonrabbit.Channel|nil, moonrabbit.Error?  a channel with confirms, of the connection that publishes
---@field heard fun(channel: moonrabbit.Channel, ok: true?, err: moonrabbit.Error?)?  how a publish on it ended
---@field outstanding (fun(message: moonrabbit.Message): true?)?  whether an original is still to be settled; always by default
---@field log fun(level: string, text: string)?
---@field observer table?   event(name, fields) is called for copies that fail
---@field now (fun(): number)?  seconds since 1970; os.time by default

---@class moonrabbit.Disposal
---@field ladder moonrabbit.Ladder
---@field parking string|false  the dead-letter queue
local Disposal = {}
Disposal.__index = Disposal
Disposal.__name = "moonrabbit.Disposal"

local disposal_options = {
  app = options.shortstr, consumer = options.table, publisher = options.callback, heard = options.callback,
  outstanding = options.callback, log = options.callback, observer = options.table, now = options.callback,
}

local function is_ladder(value)
  return type(value) == "table" and getmetatable(value) ~= nil and value.wait_name ~= nil
end

local function choose_ladder(given, app, log)
  if is_ladder(given) then return given end
  if given == nil or type(given) == "string" then return ladder.new { name = given or app, log = log } end
  local opts = { log = log }
  for key, value in pairs(given) do opts[key] = value end
  opts.name = opts.name or app
  return ladder.new(opts)
end

--- A disposal for one consumer.
---@param opts moonrabbit.DisposalOptions
---@return moonrabbit.Disposal
function disposal.new(opts)
  options.check("disposal", opts, disposal_options)
  local consumer, log = opts.consumer, opts.log or function() end
  local parking = consumer.dead_letter
  if parking == nil then parking = opts.app .. ".dead" end
  local threshold = consumer.in_process
  if threshold == true then threshold = math.huge end
  if threshold == false then threshold = -1 end
  return setmetatable({
    app = opts.app, queue = consumer.queue, parking = parking, log = log, publisher = opts.publisher,
    heard = opts.heard or function() end, outstanding = opts.outstanding or function() return true end,
    observer = opts.observer or {}, now = opts.now or os.time,
    ladder = choose_ladder(consumer.ladder, opts.app, log),
    threshold = threshold or 0.1, hold = consumer.hold or 300,
    stopped = false, wake = nil, -- what copies that fail wait in
  }, Disposal)
end

--- Declares or verifies what the consumer needs in the broker: `home`, its binding, the parking queue. To be called
--- before it consumes, and again when its queue was made anew.
---@param channel moonrabbit.Channel any open one of the connection to use
---@return true|nil, moonrabbit.Error?
function Disposal:setup(channel)
  local connection = channel.connection
  local ok, err = true, nil
  if self.threshold < math.huge then
    self.ladder._now = channel._runtime.now
    ok, err = self.ladder:setup(connection, { self.queue })
  end
  if ok and self.parking then ok, err = dead_letter.declare(connection, self.parking, self.log) end
  if ok then return true end
  return nil, err
end

--- Which attempt this delivery is: 1 for the first.
---@param msg moonrabbit.Message
---@return integer
function Disposal:attempt(msg)
  return copy.attempts(msg) + 1
end

--- Where a message was published to: a retry comes from the ladder, under its queue's name.
---@param msg moonrabbit.Message
---@return string exchange
---@return string routing_key
function Disposal:origin(msg)
  return copy.origin(msg)
end

--- Whether a retry with this delay is to be waited for in the process.
---@param _msg moonrabbit.Message
---@param delay number seconds
---@return boolean
function Disposal:in_process(_msg, delay)
  if delay <= self.threshold then return true end
  local step = self.ladder:step(delay)
  return not step or self.ladder:broken(step) ~= nil
end

-- ---- Copies that fail -------------------------------------------------------------------------------

-- Seconds between two looks whether somebody still holds the original.
local LOOK = 1

-- What trying the same copy again cannot mend.
local hopeless = { [403] = true, [406] = true }

local function can_pass(err)
  if err.kind == "overflow" then return err.temporary end
  return not hopeless[err.code]
end

local function report(self, what, err)
  self.log("error", ("the %s of a message of '%s' failed: %s"):format(what, self.queue, tostring(err)))
  if self.observer.event then
    self.observer.event("copy_failed", { queue = self.queue, what = what, error = err })
  end
end

-- Whether somebody still holds the original: if not, the broker has it again, and a copy would be a second one. Its channel
-- may be open again meanwhile.
local function is_held(self, msg)
  return not self.stopped and msg.channel:is_open() and self.outstanding(msg) == true
end

-- Waits, until the app stops or the broker has the original again: who waits keeps a place among the `concurrency`.
local function wait(self, msg, seconds)
  local runtime = msg.channel._runtime
  local now = runtime.now
  local till = now() + seconds
  self.wake = self.wake or runtime.condition()
  repeat self.wake:wait(math.max(0, math.min(LOOK, till - now()))) until now() >= till or not is_held(self, msg)
  return is_held(self, msg)
end

--- Runs send() until it succeeds, or cannot any more, or `hold` is over: true, or nil, err.
local function persist(self, msg, what, send)
  local now = msg.channel._runtime.now
  local deadline = now() + self.hold
  local pause, told = 0.5, false
  while true do
    local ok, err = send()
    if ok then return true end
    if not told then report(self, what, err) end
    told = true
    local left = deadline - now()
    if not can_pass(err) or left <= 0 or not is_held(self, msg) then return nil, err end
    if not wait(self, msg, math.min(pause, left)) then return nil, err end
    pause = math.min(pause * 2, 30)
  end
end

local function publisher(self)
  local channel, err = self.publisher()
  if channel then return channel end
  return nil, err or errors.new { kind = "closed", message = "there is no channel to publish on" }
end

local function failed_attempt(self, msg, failure, attempt)
  return attempt or failure and failure.attempt or self:attempt(msg)
end

-- ---- Retry ------------------------------------------------------------------------------------------

-- Once. A step that somebody deleted is declared again, and tried a second time.
local function send_up(self, msg, step, notes)
  local err
  for round = 1, 2 do
    local channel, exchange, ok
    channel, err = publisher(self)
    if not channel then return nil, err end
    exchange, err = self.ladder:exchange(channel.connection, step)
    if not exchange then return nil, err end
    ok, err = copy.send(msg, exchange, self.queue, { channel = channel, notes = notes, ladder = self.ladder.name,
      remove = copy.of_the_dead })
    self.heard(channel, ok, err)
    if ok then return true end
    if err.code ~= 404 and err.kind ~= "unroutable" or round == 2 then return nil, err end
    self.ladder:forget(step)
  end
  return nil, err
end

-- The failure of a handler that asked for a retry.
local asked = { message = "the handler asked for a retry", kind = "retry" }

--- Sends a copy up the ladder, to come back after `delay` seconds or up to 10 % later. True once it is safe: then the
--- original is to be acked. On nil it is to be given back.
---@param msg moonrabbit.Message
---@param delay number seconds
---@param failure moonrabbit.RetryFailure?  none: the handler asked for it
---@param attempt integer? the attempt that failed; failure.attempt, or what the message's headers say, by default
---@return true|nil, moonrabbit.Error?
function Disposal:retry(msg, delay, failure, attempt)
  options.argument("Disposal:retry", "delay", delay, options.seconds)
  local step, err = self.ladder:step(delay)
  if not step then return nil, err end
  local failed = failed_attempt(self, msg, failure, attempt)
  local notes = copy.notes(msg, failure or asked, failed, self.queue, self.now())
  local ok
  ok, err = persist(self, msg, "retry", function() return send_up(self, msg, step, notes) end)
  return ok, err
end

-- ---- Dead letters -----------------------------------------------------------------------------------

local function send_away(self, msg, notes)
  local err
  for round = 1, 2 do
    local channel, ok
    channel, err = publisher(self)
    if not channel then return nil, err end
    ok, err = copy.send(msg, "", self.parking, { channel = channel, notes = notes, ladder = self.ladder.name,
      silent = true })
    self.heard(channel, ok, err)
    if ok then return true end
    if err.kind ~= "unroutable" or round == 2 then return nil, err end
    -- Somebody deleted the queue.
    local declared, problem = dead_letter.declare(channel.connection, self.parking, self.log)
    if not declared then return nil, problem end
  end
  return nil, err
end

--- Parks a copy in the dead-letter queue. True once it is safe: then the original is to be acked. On nil it is to be
--- given back. Without a parking queue (dead_letter = false) it throws: the caller rejects the original.
---@param msg moonrabbit.Message
---@param reason string why, in a few words
---@param failure moonrabbit.RetryFailure?  none: no handler failed, it was decided
---@param attempt integer? the attempt that failed; failure.attempt, or what the message's headers say, by default
---@return true|nil, moonrabbit.Error?
function Disposal:dead_letter(msg, reason, failure, attempt)
  if not self.parking then error("Disposal:dead_letter: the consumer has no dead-letter queue", 2) end
  local at = self.now()
  local notes = copy.notes(msg, failure or {}, failed_attempt(self, msg, failure, attempt), self.queue, at)
  if not failure then notes.error, notes.last_failure, notes.first_failure = nil, nil, nil end
  notes.reason, notes.app = tostring(reason), self.app
  notes.traceback = failure and failure.traceback
  notes.dead_at = core.types.timestamp(math.floor(at))
  local ok, err = persist(self, msg, "dead letter", function() return send_away(self, msg, notes) end)
  return ok, err
end

--- Gives an original back to its queue whose copy failed: after a pause, so that it does not spin. It is rejected, as
--- poison is: from 4.3 on that counts toward a delivery limit, and before, every return does.
---@param msg moonrabbit.Message
---@param pause number? seconds; 1 by default
---@return true|nil, moonrabbit.Error?
function Disposal:give_back(msg, pause)
  if is_held(self, msg) then msg.channel._runtime.sleep(pause or 1) end
  return msg:reject { requeue = true }
end

--- Ends all waiting: copies that fail are not tried again, and what is held goes back at once.
function Disposal:stop()
  self.stopped = true
  if self.wake then self.wake:broadcast() end
end

disposal.headers, disposal.LONGEST = headers, steps.LONGEST

return disposal
