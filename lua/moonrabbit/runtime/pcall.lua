--- `pcall` that can be yielded across.
--
-- Every Lua but PUC 5.1 has that in its own pcall, and it is used. On PUC 5.1 the function runs in
-- a coroutine of its own whose yields are passed on; `owner` leads from there to the coroutine that
-- a scheduler resumes.

local described = require "moonrabbit.described"

local create, resume, yield = coroutine.create, coroutine.resume, coroutine.yield
local running, status = coroutine.running, coroutine.status
local getinfo, plain_pcall = debug.getinfo, pcall

--- How many waits of each task are looked at (see no_c_in): that makes garbage, so that a program which
--- waits where it may pays for the first few only.
local LOOKS = 16

--- `give_way(value)`: yield, in a wait. `explaining(wait, withdraw)`: a function that yields, made to say why it cannot
--- where that is not known before it tries; then `withdraw` is given its first argument.
local M = { give_way = yield, explaining = function(wait) return wait end }

--- Why a waiting call throws where it may not yield.
M.refusal = "this call waits, and it cannot inside a function that C calls (a callback of string.gsub or table.sort, "
  .. "a metamethod): wait before or after it"

local function yields_across_pcall()
  local probe = create(function() return plain_pcall(yield, "across") end)
  local _, what = resume(probe)
  return what == "across" and status(probe) == "suspended"
end

local outer_of = setmetatable({}, { __mode = "k" })

--- The error of a yield that could not, in words that help; any other as it is.
function M.explain(err)
  if type(err) ~= "string" or not err:find("attempt to yield across", 1, true) then return err end
  M.suspicious = true
  return M.refusal
end

local function plainly(_, err) return false, err end

local function with_traceback(co, err) return false, err, debug.traceback(co, described(err)) end

local function forward(fail, co, ok, ...)
  if not ok then return fail(co, M.explain((...))) end
  if status(co) == "dead" then return true, ... end
  return forward(fail, co, resume(co, yield(...)))
end

local function call_in_coroutine(fail, fn, ...)
  local outer = running()
  if not outer then return plain_pcall(fn, ...) end -- the main chunk: nothing to yield to
  local co = create(function(...) return fn(...) end) -- 5.1 takes no C function there
  outer_of[co] = outer
  return forward(fail, co, resume(co, ...))
end

--- Calls a function in protected mode; it may yield.
---@param fn function
---@return boolean ok, any ... what the function returned, or its error
local function emulated(fn, ...) return call_in_coroutine(plainly, fn, ...) end

local failure = {} -- what xpcall's handler hands on

local function catch(err)
  failure.text = debug.traceback(described(err), 2)
  return err
end

local function caught(ok, ...)
  if ok then return true, ... end
  local text = failure.text
  failure.text = nil
  return false, (...), text or described((...))
end

--- The coroutine that a coroutine made by `pcall` runs in, however deep; any other is its own.
---@param co thread?
---@return thread?
local function owner_of_emulated(co)
  while co and outer_of[co] do co = outer_of[co] end
  return co
end

-- ---- May the task yield in this coroutine, where it is now? -----------------------------------------------------------------

local is_c = setmetatable({}, { __mode = "k" })

--- PUC 5.1 does not tell, so the stack is looked through: a function of C there, or the call of a
--- generic for, is in the way. A metamethod is too, and cannot be seen.
local function no_c_in(co)
  local level, info = 1, getinfo(co, 1, "nf") -- 0 is getinfo here, and resume in those below
  while info do
    local fn = info.func
    if fn then
      local c = is_c[fn]
      if c == nil then
        c = getinfo(fn, "S").what == "C"
        is_c[fn] = c
      end
      if c or info.name == "(for generator)" then return false end
    end
    level = level + 1
    info = getinfo(co, level, "nf")
  end
  return true
end

local function no_c_below(co)
  repeat
    if not no_c_in(co) then return false end
    co = outer_of[co]
  until not co
  return true
end

--- `M.traced(fn, ...)`: as `pcall`, and with an error comes its traceback, as text.
if yields_across_pcall() then
  M.pcall = plain_pcall
  M.traced = function(fn, ...) return caught(xpcall(fn, catch, ...)) end
  M.owner = function(co) return co end
  M.may_yield = not rawget(_G, "jit") and coroutine.isyieldable -- luacheck: ignore 143
  if not M.may_yield then -- 5.2 cannot tell, LuaJIT cannot compile it: they try
    M.may_yield = function() return true end
    M.explaining = function(wait, withdraw)
      return function(subject, ...)
        local ok, result = plain_pcall(wait, subject, ...)
        if ok then return result end
        if withdraw then withdraw(subject) end
        error(M.explain(result), 0)
      end
    end
    M.give_way = M.explaining(yield)
  end
else
  M.pcall = emulated
  M.traced = function(fn, ...) return call_in_coroutine(with_traceback, fn, ...) end
  M.owner = owner_of_emulated
  M.may_yield = function(co, task)
    if not M.suspicious then
      local looks = task.looks or 0
      if looks == LOOKS then return true end
      task.looks = looks + 1
    end
    return no_c_below(co)
  end
  M.refusal = "this call waits, and on this Lua it cannot inside pcall, a generic for or another function that C calls "
    .. "(a callback of string.gsub or table.sort, a metamethod): use moonrabbit.pcall, and consumer:receive in a "
    .. "while loop"
end

return M
