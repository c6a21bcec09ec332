--- moonrabbit definitions export|import|compare

local api = require "moonrabbit.cli.api"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"

local definitions = {
  summary = "Keep, restore and compare everything of a broker but its messages.",
  description = "Users, vhosts, permissions, policies, parameters, queues, exchanges and bindings, as JSON. A file of "
    .. "them holds hashes of passwords: keep it as a secret.",
}

function definitions.build(command, common)
  command:require_command(true)
  local function sub(name, summary, file)
    local each = command:command(name) :summary(summary)
    each:argument "file" :args(file and 1 or "?") :description "-: stdin or stdout."
    each:option "--only-vhost" :argname "<name>" :description "Queues, exchanges, bindings and policies of one vhost."
    api.add_option(each)
    common(each)
  end
  sub("export", "Write them to a new file, or to stdout.")
  sub("import", "Declare what a file holds; what it does not hold stays.", true)
  sub("compare", "Say what a file holds and the broker lacks, has more, or has otherwise.", true)
end

-- ---- Files ------------------------------------------------------------------------------------------

local function read(path)
  if path == "-" then return io.read "*a" end
  local file, err = io.open(path, "rb")
  if not file then return nil, "the file cannot be opened: " .. err end
  local text = file:read "*a"
  file:close()
  if not text then return nil, "the file cannot be read: " .. path end
  return text
end

-- A file that is there is not written over, and a new one is readable by its owner only.
local function write(path, text)
  local there = io.open(path, "rb")
  if there then
    there:close()
    return nil, "the file is there already, and is not written over: " .. path
  end
  local quoted = "'" .. path:gsub("'", "'\\''") .. "'"
  os.execute("umask 077; : > " .. quoted .. " 2> /dev/null")
  local file, err = io.open(path, "wb")
  if not file then return nil, "the file cannot be written: " .. err end
  local ok, problem = file:write(text)
  local closed, why = file:close()
  if ok and closed then return true end
  return nil, "the file cannot be written: " .. tostring(problem or why)
end

local function complain(text, code)
  output.complain(text)
  return code or exit.failed
end

-- ---- Commands ---------------------------------------------------------------------------------------

local function counts(value)
  local parts = {}
  for _, section in ipairs { "vhosts", "users", "policies", "exchanges", "queues", "bindings" } do
    if type(value[section]) == "table" then parts[#parts + 1] = ("%d %s"):format(#value[section], section) end
  end
  return table.concat(parts, ", ")
end

local function export(args, client)
  local value, text = client:definitions(args.only_vhost)
  if not value then return api.fail(text) end
  if not args.file or args.file == "-" then
    output.write(text, "\n")
    return exit.ok
  end
  local written, problem = write(args.file, text)
  if not written then return complain(problem) end
  output.result({ file = args.file, bytes = #text }, ("%s: %s"):format(args.file, counts(value)))
  return exit.ok
end

local function import(args, client, text)
  local done, err = client:import_definitions(text, args.only_vhost)
  if not done then
    if err.kind == "protocol" and not err.endpoint then return complain(err, exit.usage) end
    return api.fail(err)
  end
  output.result({ imported = true }, "imported; what was there with other properties stayed as it was: compare")
  return exit.ok
end

local function line_of(difference)
  local vhost = difference.vhost and difference.vhost ~= "/" and " (vhost " .. difference.vhost .. ")" or ""
  local fields = difference.fields and ": " .. table.concat(difference.fields, ", ") or ""
  return ("%-9s %s %s%s%s"):format(difference.status, difference.section, difference.name, vhost, fields)
end

local function compare(args, client, text)
  local json = require "moonrabbit.management.json"
  local wanted = json.decode(text)
  if not wanted then return complain("the file holds no definitions: it is no JSON", exit.usage) end
  local there, err = client:definitions(args.only_vhost)
  if not there then return api.fail(err) end
  local code = exit.ok
  for _, difference in ipairs(require("moonrabbit.management").compare(wanted, there)) do
    output.result(difference, line_of(difference))
    if difference.status ~= "extra" then code = exit.failed end
  end
  return code
end

function definitions.run(args)
  local text, problem
  if not args.export then
    text, problem = read(args.file)
    if not text then return complain(problem, exit.usage) end
  end
  local client, code = api.open(args)
  if not client then return code end
  if args.export then return export(args, client) end
  return args.import and import(args, client, text) or args.compare and compare(args, client, text)
end

return definitions
