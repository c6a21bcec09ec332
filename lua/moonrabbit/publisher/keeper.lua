--- What makes a publisher survive: it keeps each message until its confirm, over all the channels that come and go.
--
-- * up, nothing unsent: a message goes out as it comes (Publisher:send_async does that by itself, up to `fast`);
-- * down: messages are kept, `_unsent` is the oldest number that waits for the next channel;
-- * up again: what is unsent goes in order, as fast as the window and the buffer allow. Numbers up to
--   `_sent` have been on the wire before and carry the mark; what is new waits behind them;
-- * a message that the broker refuses gets a time when it is due, and goes again then or with the next channel;
-- * a channel on which it refuses again and again is left for another one: until then nothing is sent (renewal.lua).
--
-- What is kept, and what happens when channels come and go, is here; beside it, one subject a file:
--
-- * `keeper/intake.lua`: taking messages, from who has one to give and from an outbox, while there is room
-- * `keeper/sending.lua`: onto the wire, in order
-- * `keeper/outcomes.lua`: confirmed, refused, failed for good
-- * `keeper/again.lua`: what goes again later, and leaving a channel for it
-- * `keeper/waiting.lua`: who waits for one confirmation, or for all
--
-- The core holds the confirmations: until one is concluded, or acked, it is pending, whatever channel it was on.
-- Nothing that a channel calls here (`_confirmed`, `_failed`, `lost`, `recovered`, `ended`) yields.
-- @module moonrabbit.publisher.keeper

local parts = require "moonrabbit.parts"
local Renewal = require "moonrabbit.publisher.renewal"
local Ring = require "moonrabbit.publisher.ring"
local Waiters = require "moonrabbit.channel.waiters"
local again = require "moonrabbit.publisher.keeper.again"
local intake = require "moonrabbit.publisher.keeper.intake"
local outcomes = require "moonrabbit.publisher.keeper.outcomes"
local sending = require "moonrabbit.publisher.keeper.sending"
local waiting = require "moonrabbit.publisher.keeper.waiting"

local max, huge = math.max, math.huge

---@class moonrabbit.publisher.Keeper
---@field channel moonrabbit.Channel
---@field ring moonrabbit.publisher.Ring
---@field fast integer     up to this number a message may be sent without asking; 0: ask
---@field resent integer   how often a message was sent again
local Keeper = {}
Keeper.__index = Keeper

parts(Keeper, intake, sending, outcomes, again, waiting)

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

-- ---- What is kept -----------------------------------------------------------------------------------

--- How many messages are not settled.
---@return integer
function Keeper:unconfirmed()
  local ring = self.ring
  if ring.first > ring.last then return 0 end
  return #ring:unsettled()
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

-- ---- Channels that come and go ----------------------------------------------------------------------

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
  self:_refresh()
end

-- Everything that is not settled waits for the next channel.
local function all_unsent(self)
  local ring = self.ring
  self._sent = max(self._sent, (self._unsent or ring.last + 1) - 1)
  self._unsent = ring.first <= ring.last and ring.first or nil
end

local function unknown(self, err)
  return self.channel._session:error(err.kind, "the outcome of the publish is unknown: " .. err.message,
    { code = err.code, class = err.class, method = err.method, temporary = err.temporary })
end

--- The channel's core channel is gone; another may come. What the broker closed for good (no such exchange, say)
--- ends what was on its way: it would only end the next channel too.
function Keeper:lost(err)
  if self._closed then return end
  self._up = false
  self._renewal:forget()
  self.ring:advance(self._ended)
  all_unsent(self)
  self:_refresh()
  local fatal = err and err.kind == "channel" and not err.temporary
  for _, n in ipairs((fatal or self._policy.deadline < huge) and self.ring:unsettled() or {}) do
    if fatal and n <= self._sent then
      self:_conclude(n, "lost", unknown(self, err))
    else
      self:_trouble(n)
    end
  end
end

--- The channel is usable again.
function Keeper:recovered()
  if self._closed then return end
  self._up, self._core = true, self.channel._core
  self:_pour()
end

--- There will be no other channel: whatever is not settled is lost, or stays in the outbox.
function Keeper:ended(err)
  if self._closed then return end
  self.ring:advance(self._ended)
  self._closed, self._up = err, false
  if self._outbox then self._outbox.ending = true end
  local left = self.ring:unsettled()
  if #left > 0 then
    local why = unknown(self, err)
    for _, n in ipairs(left) do self:_conclude(n, "lost", why) end
  end
  self.ring:advance(self._ended)
  self:_refresh()
  self._room:broadcast()
  self._settled:broadcast()
  self._alarm:broadcast()
  if self._outbox then self._outbox:close() end
end

--- Lets go of everything: the outcome of what is unsettled stays unknown.
function Keeper:close()
  self:ended(self.channel._session:error("closed", "the publisher was closed by this side", { temporary = false }))
end

return Keeper
