--- A de-duplication store in the memory of this process: bounded, and forgotten with it.
--
--     dedupe = mr.dedupe.memory { ttl = 3600, max = 100000 }
--
-- When it is full, the keys that were done longest ago are forgotten before their time; the first time that happens is
-- worth a larger `max`, and `evicted` counts them. Claims are never forgotten before their lease ends: with nothing but
-- claims it refuses new ones, with an error of kind `overflow`.
--
-- One table has a number for each key: until when it is remembered as done, or, below zero, until when it is claimed. What
-- is done also stands in the order of its commits, in blocks that are used again; a key there counts only where it
-- was not committed again since.
-- @module moonrabbit.app.dedupe.memory

local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"

local memory = {}

---@class moonrabbit.dedupe.Memory
---@field evicted integer keys that were forgotten before their time
---@field count integer   keys that are done
---@field running integer keys that are claimed
---@field quick boolean   nothing in it waits or throws: it is called without a pcall
local Store = {}
Store.__index = Store
Store.quick = true
Store.one_process = true -- other processes know nothing of it

local TTL, MAX = 3600, 100000
--- Keys of a block.
local BLOCK = 256
local huge = math.huge

---@class moonrabbit.dedupe.MemoryOptions
---@field ttl number?   seconds that a key is remembered after its commit; 3600 by default
---@field max integer?  the most keys; 100,000 by default
---@field now (fun(): number)?  a clock, in seconds; the runtime's by default

local store_options = { ttl = options.seconds, max = options.integer(1, 1000000000), now = options.callback }

local function new_block() return { first = 1, last = 0, ends = -huge, after = false } end

--- Makes one.
---@param opts moonrabbit.dedupe.MemoryOptions?
---@param level integer?
---@return moonrabbit.dedupe.Memory
function memory.new(opts, level)
  level = (level or 1) + 1
  opts = options.check("dedupe.memory", opts, store_options, level)
  if opts.ttl == 0 then error("dedupe.memory: option 'ttl' must be more than 0", level) end
  local block = new_block()
  return setmetatable({
    ttl = opts.ttl or TTL, max = opts.max or MAX, now = opts.now or os.time, own_clock = opts.now ~= nil, evicted = 0,
    known = {}, count = 0, running = 0,
    oldest = block, newest = block, spare = false, -- blocks, each with the one after it
    forget_at = huge,                              -- when the first key is to be forgotten
    look_at = 0,                                   -- of `evicted`: when to look for claims whose owners have died
  }, Store)
end

--- Takes the clock of a runtime; called by the app.
---@package
function Store:attach(runtime)
  if not self.own_clock then self.now = runtime.now end
end

-- ---- The order of commits ---------------------------------------------------------------------------

local function next_block(self)
  local block = self.spare or new_block()
  self.spare = false
  block.first, block.last, block.ends, block.after = 1, 0, -huge, false
  self.newest.after = block
  self.newest = block
  return block
end

local function append(self, key, ends)
  local block = self.newest
  local last = block.last + 1
  if last > BLOCK then
    block, last = next_block(self), 1
  end
  block[last] = key
  block.last = last
  if ends > block.ends then block.ends = ends end
  if self.forget_at == huge then self.forget_at = ends end
end

-- The block with the key that was committed longest ago; nil when there is none.
local function oldest_block(self)
  local block = self.oldest
  while block.first > block.last do
    if not block.after then return nil end
    self.oldest, self.spare = block.after, block
    block = self.oldest
  end
  return block
end

-- The first key of a block, and until when it is remembered; no time where it was claimed, given up or committed since.
local function first_of(self, block)
  local key = block[block.first]
  local ends = self.known[key]
  if ends and ends > 0 and ends <= block.ends then return key, ends end
end

local function drop_first(self, block, key)
  block.first = block.first + 1
  if key == nil then return end
  self.known[key] = nil
  self.count = self.count - 1
end

-- ---- Forgetting -------------------------------------------------------------------------------------

local function forget_old(self, now)
  local block = oldest_block(self)
  while block do
    local key, ends = first_of(self, block)
    if key ~= nil and ends > now then
      self.forget_at = ends
      return
    end
    drop_first(self, block, key)
    block = oldest_block(self)
  end
  self.forget_at = huge
end

-- Forgets the key that was done longest ago.
local function evict(self)
  local block = oldest_block(self)
  while block do
    local key = first_of(self, block)
    drop_first(self, block, key)
    if key ~= nil then
      self.evicted = self.evicted + 1
      return
    end
    block = oldest_block(self)
  end
end

local function forget_dead_claims(self, now)
  local known = self.known
  for key, ends in pairs(known) do
    if ends <= 0 and -ends <= now then
      known[key] = nil
      self.running = self.running - 1
    end
  end
end

-- Looking at all keys is for when nothing else is left, and once for so many keys that were evicted.
local function make_room(self, now)
  if self.running > 0 and (self.count == 0 or self.evicted >= self.look_at) then
    forget_dead_claims(self, now)
    self.look_at = self.evicted + self.max
  end
  while self.count > 0 and self.count + self.running >= self.max do evict(self) end
  return self.count + self.running < self.max
end

-- ---- The store --------------------------------------------------------------------------------------

local function overflow(self)
  return errors.new { kind = "overflow",
    message = ("the de-duplication store is full of messages that are being handled (max = %d)"):format(self.max) }
end

--- Claims a key for `lease` seconds: "new", "running" or "done".
---@param key string
---@param lease number seconds
---@param now number?  the runtime's time, where the caller has it
---@return "new"|"running"|"done"|nil state, moonrabbit.Error?
function Store:begin(key, lease, now)
  if not now or self.own_clock then now = self.now() end
  if now >= self.forget_at then forget_old(self, now) end
  local known = self.known
  local ends = known[key]
  if not ends then
    if self.count + self.running >= self.max and not make_room(self, now) then return nil, overflow(self) end
    self.running = self.running + 1
  elseif ends > 0 then
    if ends > now then return "done" end
    self.count, self.running = self.count - 1, self.running + 1
  elseif -ends > now then
    return "running"
  end
  known[key] = -now - lease
  return "new"
end

local function remember(self, key, ends, now)
  local before = self.known[key]
  if not before then
    if self.count + self.running >= self.max then make_room(self, now) end
    self.count = self.count + 1
  elseif before <= 0 then
    self.count, self.running = self.count + 1, self.running - 1
  end
  self.known[key] = ends
  append(self, key, ends)
end

--- Remembers a key as done.
---@param key string
---@param now number?  the runtime's time, where the caller has it
---@return true
function Store:commit(key, now)
  if not now or self.own_clock then now = self.now() end
  local known, ends = self.known, now + self.ttl
  local before = known[key]
  if not before or before > 0 then
    remember(self, key, ends, now)
    return true
  end
  self.count = self.count + 1 -- it was claimed, as nearly always
  self.running = self.running - 1
  known[key] = ends
  append(self, key, ends)
  return true
end

--- Gives a claim back.
---@param key string
---@return true
function Store:abort(key)
  local ends = self.known[key]
  if ends and ends <= 0 then
    self.known[key] = nil
    self.running = self.running - 1
  end
  return true
end

-- ---- Reload -----------------------------------------------------------------------------------------

--- What it knows, for a store that takes its place (a reload of the script).
---@return table
function Store:state()
  return self
end

--- Goes on in the place of another store, with that one's limits. So a reload keeps this store while messages of the
--- old script are still being handled: what they claim, commit or give up is known to the new one.
---@param other moonrabbit.dedupe.Memory
---@return fun() undo its own limits hold again
function Store:take_place_of(other)
  local ttl, max = self.ttl, self.max
  self.ttl, self.max = other.ttl, other.max
  return function() self.ttl, self.max = ttl, max end
end

--- Takes over what another store knew; the age of each key counts on with this one's `ttl` from its commit.
---@param other moonrabbit.dedupe.Memory
function Store:restore(other)
  local shift, now = self.ttl - other.ttl, self.now()
  local block = other.oldest
  while block do
    for i = block.first, block.last do
      local key = block[i]
      local ends = other.known[key]
      local last = ends and ends > 0 and ends <= block.ends
      if last and not self.known[key] then remember(self, key, ends + shift, now) end
    end
    block = block.after
  end
  for key, ends in pairs(other.known) do
    if ends <= 0 and not self.known[key] then
      self.known[key] = ends
      self.running = self.running + 1
    end
  end
end

return memory
