--- Loading an app script: a file of Lua that returns an app. Modules beside it can be required, and are loaded anew
-- with it.

local app = require "moonrabbit.app"

local script = {}

local own = {} -- path -> the names of the modules that the script has loaded

local function forget(path)
  for name in pairs(own[path] or {}) do package.loaded[name] = nil end
  own[path] = {}
end

local function loaded_names()
  local names = {}
  for name in pairs(package.loaded) do names[name] = true end
  return names
end

local function with_folder(path)
  local folder = path:match "^(.*)/[^/]*$" or "."
  local patterns = folder .. "/?.lua;" .. folder .. "/?/init.lua;"
  if package.path:sub(1, #patterns) ~= patterns then package.path = patterns .. package.path end
end

--- Runs the file: the app, or nil and what is wrong, with file and line. moonrabbit's own modules stay loaded.
---@param path string
---@return moonrabbit.App|nil, string? problem
function script.load(path)
  local chunk, problem = loadfile(path)
  if not chunk then return nil, problem end
  with_folder(path)
  forget(path)
  local before = loaded_names()
  local ok, result = pcall(chunk)
  for name in pairs(package.loaded) do
    if not before[name] and not name:find "^moonrabbit" then own[path][name] = true end
  end
  if not ok then
    local text = tostring(result)
    -- `return mr.app { … }` is a tail call, which leaves no line behind.
    return nil, text:find("%.lua:%d+:") == nil and text:find("^[^%s:]+:%d+:") == nil and path .. ": " .. text or text
  end
  if not app.is(result) then
    return nil, ("%s: it must return mr.app { … }, not a %s"):format(path, type(result))
  end
  return result
end

return script
