--- Waiting for descriptors.
--
-- A descriptor stays registered for reading, and is taken out only when it is found readable while
-- nobody reads (a reader that is slow on purpose): the usual turn of a connection changes nothing in
-- the poller. The same holds for writing, which is registered when a write first has to wait.
--
-- Made for a loop, { enter, park, ready, waiting }, and a function of its poller,
-- `set(fd, "r"|"w"|"rw"|"") -> true | nil, text`; whoever polls calls `notify(fd, readable, writable)`.

local EVENTS = { [true] = { [true] = "rw", [false] = "r" }, [false] = { [true] = "w", [false] = "" } }

local M = {}

function M.of(loop, set)
  local enter, park, ready = loop.enter, loop.park, loop.ready

  local watches = {} -- fd -> watch

  ---@class moonrabbit.runtime.Watch
  local Watch = {}
  Watch.__index = Watch

  local function register(watch)
    local ok, text = set(watch.fd, EVENTS[watch.r][watch.w])
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

  local D = {}

  --- Starts watching a descriptor: nothing is registered before the first wait.
  ---@return moonrabbit.runtime.Watch
  function D.watch(fd)
    local forgotten = watches[fd] -- of an owner that was collected, which closed it
    if forgotten then D.unwatch(forgotten) end
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
  function D.wait(watch, events, deadline, quiet)
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
  function D.unwatch(watch)
    if watches[watch.fd] == watch then
      watches[watch.fd] = nil
      if watch.r or watch.w then set(watch.fd, "") end
    end
    watch.r, watch.w = false, false
    wake(watch, "reader", nil)
    wake(watch, "writer", nil)
  end

  --- The same, and closes what the descriptor belongs to.
  function D.release(watch, owner)
    D.unwatch(watch)
    owner:close()
  end

  --- A descriptor was found ready.
  function D.notify(fd, r, w)
    local watch = watches[fd]
    if not watch then
      set(fd, "")
      return
    end
    local unread = r and not wake(watch, "reader", true) and watch.r
    local unwritten = w and not wake(watch, "writer", true) and watch.w
    if unread or unwritten then
      if unread then watch.r = false end
      if unwritten then watch.w = false end
      register(watch)
    end
  end

  return D
end

return M
