--- Waiting for descriptors.
--
-- A descriptor stays registered for reading, and is taken out only when it is found readable while
-- nobody reads (a reader that is slow on purpose): the usual turn of a connection changes nothing in
-- the poller. The same holds for writing, which is registered when a write first has to wait.

local loop = require "moonrabbit.runtime.native.loop"

local enter, park, ready, poller = loop.enter, loop.park, loop.ready, loop.poller

local watches = {} -- fd -> watch

---@class moonrabbit.native.Watch
local Watch = {}
Watch.__index = Watch

local EVENTS = { [true] = { [true] = "rw", [false] = "r" }, [false] = { [true] = "w", [false] = "" } }

local function register(watch)
  local ok, text = poller:set(watch.fd, EVENTS[watch.r][watch.w])
  if not ok then error("cannot wait for descriptor " .. watch.fd .. ": " .. text, 0) end
end

-- The tasks of one side are linked through `next`; nearly always there is one at most.

local function wake(watch, side, value)
  local task = watch[side]
  if not task then return false end
  watch[side] = nil
  while task do
    local after = task.next
    task.next = nil
    loop.waiting = loop.waiting - 1
    ready(task, value)
    task = after
  end
  return true
end

local function take_out(watch, side, task)
  local before, other = nil, watch[side]
  while other and other ~= task do
    before, other = other, other.next
  end
  if not other then return end
  if before then before.next = task.next else watch[side] = task.next end
  task.next = nil
  loop.waiting = loop.waiting - 1
end

--- A task gives up waiting.
function Watch:forget(task)
  take_out(self, "reader", task)
  take_out(self, "writer", task)
end

local M = {}

--- Starts watching a descriptor: nothing is registered before the first wait.
---@return moonrabbit.native.Watch
function M.watch(fd)
  local watch = setmetatable({ fd = fd, r = false, w = false, reader = nil, writer = nil }, Watch)
  watches[fd] = watch
  return watch
end

--- Waits until the descriptor is ready.
---@param events "r"|"w"
---@param deadline number?
---@param quiet boolean? see loop.park
---@return boolean|nil ready false at the deadline, nil when it was closed meanwhile
---@return string? cancelled
function M.wait(watch, events, deadline, quiet)
  local task = enter()
  local side = "reader"
  if events == "r" then
    if not watch.r then
      watch.r = true
      register(watch)
    end
  else
    side = "writer"
    if not watch.w then
      watch.w = true
      register(watch)
    end
  end
  task.on, task.next = watch, watch[side]
  watch[side] = task
  loop.waiting = loop.waiting + 1
  return park(task, deadline, quiet)
end

--- Stops watching, before the descriptor is closed; who waits for it is woken.
function M.unwatch(watch)
  if watches[watch.fd] == watch then
    watches[watch.fd] = nil
    if watch.r or watch.w then poller:set(watch.fd, "") end
  end
  watch.r, watch.w = false, false
  wake(watch, "reader", nil)
  wake(watch, "writer", nil)
end

function loop.dispatch()
  local fd, r, w = poller:next()
  while fd do
    local watch = watches[fd]
    if watch then
      local unread = r and not wake(watch, "reader", true) and watch.r
      local unwritten = w and not wake(watch, "writer", true) and watch.w
      if unread or unwritten then
        if unread then watch.r = false end
        if unwritten then watch.w = false end
        register(watch)
      end
    else
      poller:set(fd, "")
    end
    fd, r, w = poller:next()
  end
end

return M
