--- Loads the script of an app; again and again, for a reload.
--
-- The modules that stand in the script's folder are its own: they are found from any working directory, and
-- loaded anew each time. When the script turns out to be broken, those that were loaded before stay.
-- @module moonrabbit.life.script

local app = require "moonrabbit.app"
local config = require "moonrabbit.config"
local secret = require "moonrabbit.secret"

local script = {}

local function folder_of(path) return path:match "^(.*)/[^/]*$" or "." end

local function exists(path)
  local file = io.open(path, "r")
  if file then file:close() end
  return file ~= nil
end

-- The folder goes to the front of package.path, once.
local function add_folder(folder)
  local templates = folder .. "/?.lua;" .. folder .. "/?/init.lua;"
  if package.path:sub(1, #templates) ~= templates then package.path = templates .. package.path end
end

local function is_own(name, folder)
  if type(name) ~= "string" or name == "moonrabbit" or name:find "^moonrabbit%." then return false end
  local path = folder .. "/" .. name:gsub("%.", "/")
  return exists(path .. ".lua") or exists(path .. "/init.lua")
end

local function take_out(folder)
  local taken = {}
  for name, value in pairs(package.loaded) do
    if is_own(name, folder) then taken[name] = value end
  end
  for name in pairs(taken) do package.loaded[name] = nil end
  return taken
end

-- `return mr.app { … }` is a tail call, which leaves no line behind: so the line is noted as it goes. The hook of a
-- debugger or of a coverage tool has its place again afterwards; one in C could not be given it.
local function run_noting_line(chunk, path)
  local source, line = "@" .. path, nil
  local hook, mask, count = debug.gethook()
  if type(hook) == "string" then return pcall(chunk) end
  debug.sethook(function(_, current)
    if debug.getinfo(2, "S").source == source then line = current end
  end, "l")
  local ok, value = pcall(chunk)
  debug.sethook(hook, mask, count)
  return ok, value, line
end

local function with_place(text, path, line)
  text = tostring(text)
  if text:find "^[^\n:]+:%d+: " then return text end
  return ("%s:%s: %s"):format(path, line or "?", text:gsub("^%?:%-?%d+: ", ""):gsub("^%?: ", ""))
end

local function load_app(path)
  if not exists(path) then return nil, path .. ": there is no such file, or it cannot be read" end
  local chunk, problem = loadfile(path)
  if not chunk then return nil, problem end
  local ok, value, line = run_noting_line(chunk, path)
  if not ok then return nil, with_place(value, path, line) end
  if app.is(value) then return value end
  return nil, ("%s: the script returned %s, and no app: its last line is to be return mr.app { … }"):format(path,
    value == nil and "nothing" or "a " .. type(value))
end

local function load_for(path, environment)
  config.choose(environment)
  local loaded, problem = load_app(path)
  if loaded and environment and not config.used() then
    return nil, ("%s: there is no environment '%s', for the script has none: mr.config { %s = { … } }"):format(path,
      environment, environment)
  end
  return loaded, problem
end

--- The app that a script returns; nil and what is wrong with it: file, line, and what was expected.
---@param path string
---@param environment string?  for mr.config; what MOONRABBIT_ENV says by default
---@return moonrabbit.App|nil, string? problem
function script.load(path, environment)
  local folder = folder_of(path)
  add_folder(folder)
  local taken = take_out(folder)
  local loaded, problem = load_for(path, environment)
  if loaded then return loaded end
  take_out(folder)
  for name, value in pairs(taken) do package.loaded[name] = value end
  return nil, problem
end

-- ---- Secrets ----------------------------------------------------------------------------------------

local DEEPEST = 5

local function find_secrets(value, path, list, depth)
  if secret.is(value) then
    list[#list + 1] = { path = path, ask = value }
  elseif type(value) == "table" and depth < DEEPEST then
    for key, each in pairs(value) do find_secrets(each, path .. "." .. tostring(key), list, depth + 1) end
  end
end

--- Asks for every secret of the script that was loaded last: those of its environment, and those that it connects
--- with. True; nil, and what is missing, without a value.
---@param loaded moonrabbit.App
---@return true|nil, string? problem
function script.verify(loaded)
  local list, seen = {}, {}
  for i, each in ipairs(config.secrets()) do list[i] = each end
  find_secrets(loaded._spec.connect, "connect", list, 0)
  for _, each in ipairs(list) do
    local ok, why = true, nil
    if not seen[each.ask] then ok, why = secret.check(each.ask) end
    seen[each.ask] = true
    if not ok then return nil, ("the secret %s: %s"):format(each.path, why) end
  end
  return true
end

return script
