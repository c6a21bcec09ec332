-- Every `moonrabbit …` in the documentation's blocks of the shell is a command line that moonrabbit takes, and every
-- program of this checkout that they name is there.
local pages = require "support.pages"

local function each_block(fn)
  for _, page in ipairs(pages.all()) do
    for _, block in ipairs(pages.read(page)) do
      if block.language == "sh" then fn(block.code, ("%s:%d"):format(page, block.line)) end
    end
  end
end

describe("the commands of the documentation", function()
  it("are taken by moonrabbit", function()
    local cli, total = require "moonrabbit.cli", 0
    each_block(function(code, where)
      for _, command in ipairs(pages.commands(code)) do
        total = total + 1
        local args, problem = cli.parse(command.words)
        assert.truthy(args, ("%s: %s: %s"):format(where, command.line, tostring(problem)))
      end
    end)
    assert.truthy(total >= 50, total)
  end)

  it("are taken by moonrabbit in the heads of the examples for nginx, too", function()
    local cli, total = require "moonrabbit.cli", 0
    local pipe = assert(io.popen "cat examples/openresty/*/nginx.conf")
    for line in pipe:lines() do
      for _, command in ipairs(pages.commands(line:match "^#   (.*)" or "")) do
        total = total + 1
        local args, problem = cli.parse(command.words)
        assert.truthy(args, ("%s: %s"):format(command.line, tostring(problem)))
        assert.is_nil(args.key, command.line .. ": --key is a file, of TLS")
      end
    end
    pipe:close()
    assert.truthy(total >= 3, total)
  end)

  it("would be refused with an option that there is not", function()
    local cli = require "moonrabbit.cli"
    local commands = pages.commands "moonrabbit run 'a b.lua' --worker-count 2 | cat\nmoonrabbit top --once # look\n"
    assert.same({ { "run", "a b.lua", "--worker-count", "2" }, { "top", "--once" } },
      { commands[1].words, commands[2].words })
    assert.falsy((cli.parse(commands[1].words)))
    assert.truthy((cli.parse(commands[2].words)))
  end)

  it("name programs that there are", function()
    each_block(function(code, where)
      for path in code:gmatch "%f[%w/.]((%l+)/[%w_/.-]+)" do
        local folder = path:match "^(%l+)/"
        if folder == "scripts" or folder == "bench" or folder == "chaos" or folder == "examples" then
          local file = io.open(path)
          assert.truthy(file, where .. " names " .. path)
          file:close()
        end
      end
    end)
  end)
end)
