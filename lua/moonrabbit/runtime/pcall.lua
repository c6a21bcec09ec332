--- `pcall` that can be yielded across.
--
-- Every Lua but PUC 5.1 has that in its own pcall, and it is used. On PUC 5.1 the function runs in
-- a coroutine of its own whose yields are passed on; `owner` leads from there to the coroutine that
-- a scheduler resumes.

local create, resume, yield = coroutine.create, coroutine.resume, coroutine.yield
local running, status = coroutine.running, coroutine.status
local plain_pcall = pcall

local M = {}

local function yields_across_pcall()
  local probe = create(function() return plain_pcall(yield, "across") end)
  local _, what = resume(probe)
  return what == "across" and status(probe) == "suspended"
end

local outer_of = setmetatable({}, { __mode = "k" })

local function forward(co, ok, ...)
  if not ok or status(co) == "dead" then return ok, ... end
  return forward(co, resume(co, yield(...)))
end

--- Calls a function in protected mode; it may yield.
---@param fn function
---@return boolean ok, any ... what the function returned, or its error
local function emulated(fn, ...)
  local outer = running()
  if not outer then return plain_pcall(fn, ...) end -- the main chunk: nothing to yield to
  local co = create(function(...) return fn(...) end) -- 5.1 takes no C function there
  outer_of[co] = outer
  return forward(co, resume(co, ...))
end

--- The coroutine that a coroutine made by `pcall` runs in, however deep; any other is its own.
---@param co thread?
---@return thread?
local function owner_of_emulated(co)
  while co and outer_of[co] do co = outer_of[co] end
  return co
end

if yields_across_pcall() then
  M.pcall = plain_pcall
  M.owner = function(co) return co end
else
  M.pcall = emulated
  M.owner = owner_of_emulated
end

return M
